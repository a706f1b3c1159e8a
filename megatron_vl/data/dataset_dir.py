"""Checks on a prepared dataset's directory, so that a hole in it is a sentence and not a traceback
of a worker process an hour later."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import braceexpand
import yaml

from megatron_vl.errors import InputError

_PREPARE = "prepare the dataset again with `megatron-vl prepare`"


def check_dataset(path: Path, split: str) -> int:
    """Whether `split` of the prepared WebDataset at `path` is complete on disk.

    Returns:
        Samples in the split.

    Raises:
        InputError: the directory, its metadata, a shard or an index is missing or cut off, or the
            split is empty.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"the dataset {path} does not exist; give the directory `megatron-vl prepare` wrote."
        )
    meta = path / ".nv-meta"
    if not meta.is_dir():
        raise InputError(
            f"{path} is no prepared dataset (it has no .nv-meta); run `megatron-vl prepare` and "
            f"give the directory it writes."
        )
    info_path = _info_path(path)
    info = _read(info_path, json.loads if info_path.suffix == ".json" else yaml.safe_load)
    _read(meta / "dataset.yaml", yaml.safe_load)
    shards = split_shards(path, split)
    counts = info.get("shard_counts") if isinstance(info, dict) else None
    if not isinstance(counts, dict):
        raise InputError(f"{info_path} has no shard_counts; {_PREPARE}.")
    for shard in shards:
        if shard not in counts:
            raise InputError(f"{info_path} does not list shard {shard}; {_PREPARE}.")
        _check_shard(path / shard)
    return sum(counts[shard] for shard in shards)


def fingerprint(path: Path) -> str:
    """Of a checked dataset's shards, their samples and splits, wherever the directory lies."""
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
    config = _read(Path(path) / ".nv-meta" / "split.yaml", yaml.safe_load)
    config = config if isinstance(config, dict) else {}
    excluded = {name for entry in config.get("exclude") or () for name in _expand(entry)}
    return {
        split: [name for entry in entries or () for name in _expand(entry) if name not in excluded]
        for split, entries in (config.get("split_parts") or {}).items()
    }


def _expand(entry: str) -> Iterator[str]:
    return braceexpand.braceexpand(entry)


def _read(path: Path, parse) -> object:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} is missing or unreadable; {_PREPARE}.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is damaged; {_PREPARE}.") from error


def _check_shard(shard: Path) -> None:
    index = shard.with_suffix(".tar.idx")
    try:
        size = shard.stat().st_size
    except OSError as error:
        raise InputError(f"the shard {shard} is missing; restore it, or {_PREPARE}.") from error
    try:
        with index.open("rb") as file:
            file.seek(-8, 2)
            (end,) = struct.unpack("Q", file.read(8))
    except OSError as error:
        raise InputError(
            f"the shard index {index} is missing or empty; restore it, or {_PREPARE}."
        ) from error
    if size < end:
        raise InputError(
            f"the shard {shard} is cut off (it has {size} bytes, its index tells of {end}); copy "
            f"it again, or {_PREPARE}."
        )
