"""Checks on a prepared dataset's directory, so that a hole in it is a sentence and not a traceback
of a worker process an hour later."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from math import prod
from pathlib import Path
from typing import Annotated, Any

import braceexpand
from pydantic import ConfigDict, Field

from megatron_vl.errors import InputError, shown
from megatron_vl.typed import Count, Shape, Text, read_file

_PREPARE = "prepare the dataset again with `megatron-vl prepare`"
_ENERGON = "megatron.energon"  # the one module that a dataset's YAML may name
_META_FILES = ("dataset_config", "split_config")  # of a metadataset: other YAMLs of .nv-meta
# energon's sample types that are read -> the fields that they need.
SAMPLE_TYPES = {
    "CaptioningSample": ("image", "caption"),
    "VQASample": ("image", "context", "answers"),
    "VidQASample": ("video", "context", "answers"),
    "MultiChoiceVQASample": ("image", "context", "choices", "correct_choice_idx"),
}
_MAX_SHARDS = 1_000_000  # that one pattern may stand for
_MAX_NAME = 4096  # bytes of a path that a system takes
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")


class _Energons(Shape):
    """A file that energon reads too, and refuses with other keys."""

    model_config = ConfigDict(extra="forbid")


class _Info(_Energons):
    """.info.json"""

    energon_version: Text | None = None
    shard_counts: dict[Text, Count]


_Excluded = Annotated[Text, Field(pattern=r"\.tar(/|$)")]  # a shard, or one of its samples


class _Splits(_Energons):
    """split.yaml"""

    split_parts: dict[Text, list[Text]]
    exclude: list[_Excluded] = Field(default_factory=list)


def check_dataset(path: Path, split: str) -> int:
    """Whether `split` of the prepared WebDataset at `path` is complete on disk.

    Returns:
        Samples in the split.

    Raises:
        InputError: the directory, its metadata, a shard or an index is missing or cut off, an index
            and the metadata disagree, or the split is empty.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise InputError(
            f"the dataset {shown(path)} does not exist; give the directory `megatron-vl "
            f"prepare` wrote."
        )
    meta = path / ".nv-meta"
    if not meta.is_dir():
        raise InputError(
            f"{path} is no prepared dataset (it has no .nv-meta); run `megatron-vl prepare` and "
            f"give the directory it writes."
        )
    info_path = _info_path(path)
    counts = read_meta(info_path, _Info).shard_counts
    dataset = read_meta(meta / "dataset.yaml", dict | None) or {}
    for suffix in ("yaml", "yml", "json"):
        for config in sorted(meta.glob(f"*.{suffix}")):
            check_names_no_code(read_meta(config), config)
    _check_sample_type(dataset, meta / "dataset.yaml")
    shards = split_shards(path, split)
    for shard in shards:
        if shard not in counts:
            raise InputError(f"{info_path} does not list shard {shown(shard)}; {_PREPARE}.")
        _check_shard(path / shard, counts[shard], info_path)
    return sum(counts[shard] for shard in shards)


def _check_sample_type(config: dict, file: Path) -> None:
    """Whether what dataset.yaml makes of a sample can be trained on.

    Raises:
        InputError: a type without a question and an answer, or fields that are missing.
    """
    own, named = config.get("__class__"), config.get("sample_type")
    if own == "CrudeWebdataset":
        return  # as `prepare` writes it
    name = str(named.get("__class__")) if isinstance(named, dict) else (
        str(own).replace("Webdataset", "Sample")  # as older versions of energon wrote it
    )
    if name not in SAMPLE_TYPES:
        raise InputError(
            f"{file} names the sample type {shown(name)}, of which no question and answer can "
            f"be made; name one of {', '.join(SAMPLE_TYPES)} with a field_map, or write the "
            f"conversations as JSON and run `megatron-vl prepare`."
        )
    fields = config.get("field_map")
    missing = [one for one in SAMPLE_TYPES[name] if one not in fields] if isinstance(
        fields, dict) else SAMPLE_TYPES[name]
    if missing:
        raise InputError(
            f"the field_map of {file} lacks {', '.join(missing)}, which a {name} needs; add them, "
            f"or {_PREPARE}."
        )


def fingerprint(path: Path) -> str:
    """Of a checked dataset's shards, how many samples they hold and its splits, wherever it lies.

    `contents_of` tells the samples.
    """
    digest = hashlib.sha256()
    for file in (_info_path(path), Path(path) / ".nv-meta" / "split.yaml"):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def splits(path: Path) -> list[str]:
    """Names of the splits that hold shards.

    Raises:
        InputError: split.yaml is missing or damaged.
    """
    return [name for name, shards in _split_parts(path).items() if shards]


def split_shards(path: Path, split: str) -> list[str]:
    """Names of the shards of one split, in order.

    Raises:
        InputError: no such split, or nothing in it.
    """
    shards = _split_parts(path).get(split)
    if not shards:
        raise InputError(
            f"the dataset {path} has nothing in its split {split!r}; prepare it with a --split "
            f"that gives {split!r} a share, or give another dataset."
        )
    return shards


def _info_path(path: Path) -> Path:
    """energon's counts; older versions of it wrote YAML."""
    info, older = (Path(path) / ".nv-meta" / name for name in (".info.json", ".info.yaml"))
    return older if older.is_file() and not info.is_file() else info


def _split_parts(path: Path) -> dict[str, list[str]]:
    file = Path(path) / ".nv-meta" / "split.yaml"
    config = read_meta(file, _Splits)
    try:
        excluded = {name for entry in config.exclude for name in _expand(entry)}
        parts = {
            split: [name for entry in entries for name in _expand(entry) if name not in excluded]
            for split, entries in config.split_parts.items()
        }
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({shown(error)}); {_PREPARE}.") from error
    for name in (name for names in parts.values() for name in names):
        # energon opens what is named here and indexes nothing else.
        if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise InputError(f"{file} names the shard {shown(name)}, outside {path}; {_PREPARE}.")
        if not name.endswith(".tar") or "\0" in name or len(name.encode()) > _MAX_NAME:
            raise InputError(f"{file} names {shown(repr(name))}, no shard; {_PREPARE}.")
    return parts


def _expand(entry: str) -> list[str]:
    # Not found out by expanding it: a range is made whole, and the lists multiply.
    number = prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(entry))
    commas: list[int] = []  # in each list that is open
    for letter in entry:
        if letter == "{":
            commas.append(0)
        elif letter == "," and commas:
            commas[-1] += 1
        elif letter == "}" and commas:
            number *= commas.pop() + 1
    if number > _MAX_SHARDS:
        raise ValueError(f"{shown(entry)} is more than {_MAX_SHARDS:,} shards")
    return list(braceexpand.braceexpand(entry))


def check_names_no_code(value: object, file: Path) -> None:
    """Whether a YAML of energon's names nothing but energon's own classes.

    energon imports and calls whatever `__module__` and `__class__` or `__function__` name, and runs
    a Python file beside the YAML that `sample_loader` or `part_filter` name: whoever wrote a
    dataset would run as its reader.

    Raises:
        InputError: it does.
    """
    if isinstance(value, list):
        for one in value:
            check_names_no_code(one, file)
    if not isinstance(value, dict):
        return
    for key, one in value.items():
        own = one == _ENERGON if key == "__module__" else (
            not isinstance(one, str) if key == "part_filter" else
            key not in ("__function__", "sample_loader")
        )
        if not own:
            raise InputError(
                f"{file} asks for Python code to be run ({shown(key)}: {shown(one)}), which data "
                f"may not; use energon's own classes with a field_map, or {_PREPARE}."
            )
        if key in _META_FILES and os.path.basename(str(one)) != one:
            raise InputError(
                f"{file} names {shown(one)} as {key}, no file of .nv-meta; put it there."
            )
        check_names_no_code(one, file)


def read_meta(path: Path, kind: Any = Any) -> Any:
    """A YAML or JSON of energon's. Raises InputError: it is missing, damaged, or no `kind`."""
    return read_file(path, kind, mend=_PREPARE)


def _check_shard(shard: Path, count: int, info_path: Path) -> None:
    """Whether a shard is whole and its index tells of the `count` samples of `info_path`."""
    index = shard.with_suffix(".tar.idx")
    try:
        size = shard.stat().st_size
    except OSError as error:
        raise InputError(
            f"the shard {shown(shard)} is missing; restore it, or {_PREPARE}."
        ) from error
    try:
        with index.open("rb") as file:
            length = file.seek(-8, 2) + 8
            (end,) = struct.unpack("Q", file.read(8))
    except OSError as error:
        raise InputError(
            f"the shard index {shown(index)} is missing or empty; restore it, or {_PREPARE}."
        ) from error
    # A place for the beginning of each sample, and one for the end of the last.
    if length % 8 or count != length // 8 - 1:
        raise InputError(
            f"the shard index {index} tells of {(length / 8 - 1):g} samples but {info_path} of "
            f"{count}; copy the dataset again, or {_PREPARE}."
        )
    if size < end:
        raise InputError(
            f"the shard {shard} is cut off (it has {size} bytes, its index tells of {end}); copy "
            f"it again, or {_PREPARE}."
        )
