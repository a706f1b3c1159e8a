"""What a run wrote about itself, read back: its metrics file, a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.errors import InputError

METRICS, PAGE = "metrics.jsonl", "report.html"
_LONGEST = 2**24  # bytes of a line: of tens of thousands of ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """A run with all its resumptions, each step once: of a repeated one the later line counts."""

    file: Path
    steps: list[dict]
    validations: list[dict]
    starts: list[dict]  # what ran where with which options, at every start; absent in old files
    ranks: dict | None  # the last word on each rank's times and memory


def read_history(source: str | Path) -> History:
    """The run in a metrics file, or in a directory that holds one.

    Raises:
        InputError: no such file, or a line that is no JSON object of a known kind.
    """
    path = Path(source)
    path = path / METRICS if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a run's metrics.jsonl or its directory.")
    kinds: dict[str, dict[int, dict]] = {"train": {}, "validation": {}, "run": {}, "ranks": {}}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            found = kinds[record["kind"]]
            found[number if record["kind"] == "run" else record["iteration"]] = record
        except (json.JSONDecodeError, KeyError, TypeError):
            raise InputError(f"{path}:{number} is not a line of run metrics.") from None
    steps, validations, starts, ranks = (
        [records[at] for at in sorted(records)] for records in kinds.values()
    )
    return History(file=path, steps=steps, validations=validations, starts=starts,
                   ranks=ranks[-1] if ranks else None)


def cut_unfinished(metrics: Path) -> None:
    """Take off a last line that a killed run did not finish, before another goes on behind it."""
    if not metrics.is_file():
        return
    with metrics.open("rb+") as file:
        start = max(0, file.seek(0, 2) - _LONGEST)
        file.seek(start)
        whole, newline, rest = file.read().rpartition(b"\n")
        if rest.startswith(b'{"kind"'):  # and nothing else: the file might be another's
            file.truncate(start + len(whole) + len(newline))


def page_of(metrics: Path) -> Path:
    """Where the page about a run goes unless told: beside its metrics file, named after it."""
    return metrics.with_name(PAGE) if metrics.name == METRICS else metrics.with_suffix(".html")


def names_of(sources: Iterable[str | Path]) -> list[str]:
    """What tells runs apart: the directory's name, with as much before it as that takes.

    A directory `log` says nothing and is left out; a metrics file of another name has its own.
    """
    paths = [Path(source).absolute() for source in sources]
    folders = [path.parent if path.name == METRICS else path.with_suffix("")
               if path.suffix == ".jsonl" else path for path in paths]
    parts = [(one.parent if one.name in ("log", "logs") and one.parent.name else one).parts
             for one in folders]
    longest = max(map(len, parts), default=0)
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def total(steps: Sequence[dict], name: str) -> float:
    """The sum of a number over steps; older runs' lines may lack it."""
    return sum(step.get(name) or 0 for step in steps)
