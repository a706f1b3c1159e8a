"""Which prepared datasets a run reads, and how much of each.

One directory; several by commas, each once an epoch (`a,b`) or by weight (`0.3,a,0.7,b`, as
Megatron-LM writes it); or a YAML file with energon's metadataset, for all that is more than that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.data.contents import contents_of
from megatron_vl.data.dataset_dir import (
    check_dataset,
    check_names_no_code,
    fingerprint,
    split_shards,
)
from megatron_vl.errors import InputError, shown
from megatron_vl.typed import read_file

_YAML = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Datasets that are read as one.

    Raises:
        InputError: weights or a number of samples that cannot be used.
    """

    paths: tuple[Path, ...]  # dataset directories, or one metadataset's YAML file
    weights: tuple[float, ...] | None = None  # of each; None: each dataset once an epoch
    max_samples: int | None = None  # of each dataset the first so many; None: all

    def __post_init__(self) -> None:
        assert self.weights is None or len(self.weights) == len(self.paths)
        for path, weight in zip(self.paths, self.weights or (), strict=False):
            if not 1e-9 <= weight <= 1e9:
                raise InputError(
                    f"the weight of {path} is {weight}; give a number above 0, up to 1e9."
                )
        if self.max_samples is not None and self.max_samples < 1:
            raise InputError(f"max-samples is {self.max_samples}; give at least 1.")
        if self.max_samples is not None and self.metadataset is not None:
            raise InputError(
                f"max-samples does not reach into the metadataset {self.metadataset}; write "
                f"`subset: {{range: [0, {self.max_samples}]}}` beside a dataset's path there."
            )
        twice = {path for path in self.paths if self.paths.count(path) > 1}
        if twice:
            raise InputError(f"the dataset {min(twice)} is given twice; weigh it instead.")

    @classmethod
    def parse(cls, text: str, *, max_samples: int | None = None) -> Mixture:
        """What a person wrote.

        Raises:
            InputError: a list that is neither all paths nor weights and paths in turn.
        """
        words = [word.strip() for word in text.split(",")]
        if os.path.exists(text):
            words = [text]
        if not all(words):
            raise InputError(f"the dataset list {text!r} has an empty entry; remove a comma.")
        numbers = [_number(word) for word in words]
        weights = None
        if len(words) > 1 and any(number is not None for number in numbers):
            weights, words, rest = numbers[::2], words[1::2], numbers[1::2]
            if len(weights) != len(words) or None in weights or any(x is not None for x in rest):
                raise InputError(
                    f"the dataset list {text!r} mixes weights and paths out of turn; write "
                    f"0.3,DIR,0.7,DIR, or paths alone."
                )
        paths = tuple(Path(word) for word in words)
        if len(paths) > 1 and any(path.suffix in _YAML for path in paths):
            raise InputError(
                f"the dataset list {text!r} holds a metadataset; give it alone, or name it in "
                f"another metadataset."
            )
        return cls(
            paths=paths, weights=None if weights is None else tuple(weights),
            max_samples=max_samples,
        )

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    def names(self, split: str) -> dict[str, str]:
        """What tells the datasets of `split` apart, by absolute path; empty if there is one.

        The last parts of their paths, as few as will do.
        """
        paths = dict.fromkeys(Path(os.path.abspath(path)) for path, _ in self.leaves(split))
        names: dict[str, str] = {}
        count = 0
        while len(paths) > 1 and len(set(names.values())) < len(paths):
            count += 1
            names = {str(path): str(Path(*path.parts[-count:])) for path in paths}
        return names

    @property
    def metadataset(self) -> Path | None:
        """The YAML file, if it is one."""
        (first, *_) = self.paths
        return first if first.suffix in _YAML else None

    def check(self, split: str) -> dict[Path, int]:
        """Samples that `split` reads of each dataset.

        Raises:
            InputError: a dataset that is not complete on disk, or a metadataset that is none.
        """
        counts = {path: check_dataset(path, part) for path, part in self.leaves(split)}
        if self.max_samples is None:
            return counts
        return {path: min(count, self.max_samples) for path, count in counts.items()}

    def fingerprint(self) -> str:
        """Of the datasets' numbers of samples and how they are mixed, wherever they lie."""
        digest = hashlib.sha256(repr((self.weights, self.max_samples)).encode())
        for path, _ in self.leaves("train"):
            digest.update(fingerprint(path).encode())
        if self.metadataset is not None:
            digest.update(self.metadataset.read_bytes())
        return digest.hexdigest()[:16]

    def contents(self, split: str) -> dict[str, dict[str, str | None]]:
        """What tells the samples of every dataset from others, by absolute path: see `contents_of`.

        Raises:
            InputError: see `check`.
        """
        return {
            os.path.abspath(path): contents_of(path, split_shards(path, part))
            for path, part in self.leaves(split)
        }

    def as_energon(self, split: str) -> Path | dict:
        """What energon's `get_train_dataset` and `get_val_dataset` take.

        Raises:
            InputError: see `check`.
        """
        (first, *others) = self.paths
        if not others and self.max_samples is None:
            return first
        counts = {} if self.max_samples is None else self.check(split)
        entries = []
        for number, path in enumerate(self.paths):
            entry: dict = {"path": str(path.absolute())}
            if self.max_samples is not None:
                entry["subset"] = {"range": [0, counts[path]]}
            if self.weights is None:
                entry["repetitions"] = 1
            else:
                entry["weight"] = self.weights[number]
            entries.append(entry)
        return {
            "__module__": "megatron.energon",
            "__class__": "MetadatasetV2",
            "splits": {split: {"blend" if self.weights else "blend_epochized": entries}},
        }

    def leaves(self, split: str) -> list[tuple[Path, str]]:
        """Dataset directories and the part of each that `split` reads.

        Raises:
            InputError: a metadataset that is none.
        """
        if self.metadataset is None:
            return [(path, split) for path in self.paths]
        from megatron.energon.metadataset.loader import traverse_metadataset

        if not os.path.isfile(self.metadataset):
            raise InputError(f"the metadataset {self.metadataset} does not exist; check the path.")
        _check_metadataset(self.metadataset, set())
        try:
            leaves = traverse_metadataset(self.metadataset, split_part=split)
        except Exception as error:  # YAML's, energon's typed parser's, asserts, missing keys
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(
                f"the metadataset {self.metadataset} cannot be used for its split {split!r} "
                f"({shown(words[0])}); see energon's MetadatasetV2."
            ) from error
        return [(Path(str(leaf.path)), leaf.split_part or split) for leaf in leaves]


def _check_metadataset(path: Path, known: set[Path]) -> None:
    """Raises InputError: it, or another that it names, asks for code to be run."""
    if path in known or not os.path.isfile(path):
        return
    known.add(path)
    value = read_file(path, mend="correct it", what="the metadataset ")
    check_names_no_code(value, path)
    for name in _texts(value):
        if name.endswith(_YAML):
            _check_metadataset(path.parent / name, known)


def _texts(value: object) -> Iterator[str]:
    """Every text in a YAML's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
