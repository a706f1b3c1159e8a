"""What was answered so far, on disk, so that a rerun goes on where the last ended."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.typed import read_file

ANSWERS, ASKED, PAGE = "answers.jsonl", "asked.json", "worst.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """A question and what became of it."""

    dataset: str
    number: int  # of the sample in its dataset, from 0
    sample: str  # where a person finds it
    turn: int  # of the answer among the sample's turns, from 0
    question: str = ""  # the last turn before it
    expected: str = ""
    answer: str = ""
    score: float = 0.0
    is_whole: bool = True  # False: cut off after max_new_tokens
    groups: tuple[str, ...] = ()
    refused: str | None = None  # why it was not asked: one of a few reasons, to count by
    message: str = ""  # the details

    @property
    def key(self) -> tuple[str, int, int]:
        return self.dataset, self.number, self.turn


@dataclass
class Record:
    """Answers by their keys, in the order they were made; written down where there is a folder."""

    folder: Path | None
    answers: dict[tuple[str, int, int], Answered] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path | None, asked: Mapping[str, object]) -> Record:
        """A new one, or the one that the folder holds.

        Args:
            asked: the model, the data and all that answers and scores depend on.

        Raises:
            InputError: the folder holds something else, or answers to something else.
        """
        if folder is None:
            return cls(None)
        asked = json.loads(json.dumps(asked))
        if (folder / ASKED).is_file():
            before = read_file(folder / ASKED, dict, mend="remove the directory")
            for name, value in asked.items():
                if before.get(name) != value:
                    both = "" if isinstance(value, dict) else f" ({before.get(name)}, not {value})"
                    raise InputError(
                        f"{folder} holds answers for another {name}{both}; give --output another "
                        f"directory, or remove this one."
                    )
            return cls(folder, {one.key: one for one in _read(folder / ANSWERS)})
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} holds no answers of an evaluation; give --output another "
                             f"directory.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ASKED).write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error}); give --output another "
                             f"directory.") from error
        return cls(folder)

    def add(self, answers: Iterable[Answered]) -> None:
        """Note answers, on disk at once."""
        new = {one.key: one for one in answers}
        self.answers |= new
        if self.folder is not None:
            lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in new.values())
            path = self.folder / ANSWERS
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(lines))


def _read(path: Path) -> list[Answered]:
    """The whole lines of a file; a last one that was cut off is taken away."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    try:
        found = [json.loads(line) for line in whole.splitlines()]
        return [Answered(**one | {"groups": tuple(one["groups"])}) for one in found]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}); remove its directory.") from error
