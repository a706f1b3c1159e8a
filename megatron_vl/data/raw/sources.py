"""Where raw entries come from: which files of a source, in which format, with which columns.

A source is a file (JSON list, JSON lines, parquet, a ChatML tar shard) or a directory with one; the
shards of a table or of a ChatML dataset count as one. A dataset_info.json in the directory may name
several datasets, each with its format and columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from megatron_vl.data.conversation import BadEntry, Conversation
from megatron_vl.data.raw import dataset_info
from megatron_vl.data.raw.formats import FORMATS, Fields
from megatron_vl.data.raw.source_files import LINES, PARQUET, TARS, SourceFile, is_other, open_file
from megatron_vl.errors import InputError

KNOWN_JSON = "blip_laion_cc_sbu_558k.json"  # LLaVA-Pretrain's own, beside a *_meta.json
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.parquet")
_TAR_FORMAT = "chatml"  # the one raw format with shards


class SourceEntry(NamedTuple):
    """One entry as the source holds it."""

    file: Path
    number: int  # from 0, over all files
    where: str  # in the file: "entry 3", "line 4", "row 3" or "sample KEY"
    entry: dict | BadEntry


@dataclass(frozen=True, kw_only=True)
class RawSource:
    """The files of a source, and how they are read."""

    format: str  # one of FORMATS
    fields: Fields
    files: tuple[Path, ...]
    root: Path  # what the entries' media paths are relative to, unless a person says otherwise
    readers: tuple[SourceFile, ...]  # of `files`

    def entries(self) -> Iterator[SourceEntry]:
        """Every entry, one after another; what cannot be read of it is in its place.

        Raises:
            InputError: a file as a whole cannot be read.
        """
        number = 0
        for file, reader in zip(self.files, self.readers, strict=True):
            for where, entry in reader.entries():
                yield SourceEntry(file, number, where, entry)
                number += 1

    def read(self, entry: dict) -> Conversation:
        """The conversation of an entry.

        Raises:
            BadEntry: it is not of the source's format, or cannot be trained on.
        """
        return FORMATS[self.format](entry, self.fields)

    def count(self) -> int | None:
        """How many entries there are, good and bad; None where only reading tells.

        Raises:
            InputError: a file cannot be read.
        """
        counts = [reader.count() for reader in self.readers]
        return None if None in counts else sum(counts)


def open_source(
    source: Path, *, format: str, json_name: str | None, dataset: str | None,
    fields: Fields | None = None,
) -> RawSource:
    """The entries of `source`, a file or a directory.

    Args:
        format: one of FORMATS; a dataset's own formatting stands above it.
        json_name: the file in a directory that has several, or the name of a sharded table.
        dataset: a name in the directory's dataset_info.json.
        fields: columns and tags that are not the format's own.

    Raises:
        InputError: nothing to read, or several to choose from.
    """
    if format not in FORMATS:
        names = ", ".join(sorted(FORMATS))
        raise InputError(f"--format is {format!r}; it must be one of: {names}.")
    if dataset is not None:
        if fields not in (None, Fields()):
            raise InputError(
                f"--columns and the columns of --dataset {dataset} exclude one another; give one."
            )
        if json_name is not None:
            raise InputError(
                f"--dataset {dataset} and --json {json_name} both name what to read; give one."
            )
        directory = source.parent if source.name == dataset_info.NAME else source
        info = dataset_info.read_dataset_info(directory, dataset)
        return _open(_dataset_files(info), info.format, info.fields, directory)
    files = find_files(source, json_name, format)
    root = source if source.is_dir() and json_name is None else files[0].parent
    return _open(files, format, fields or Fields(), root)


def _open(files: tuple[Path, ...], format: str, fields: Fields, root: Path) -> RawSource:
    tar = next((path for path in files if path.name.lower().endswith(TARS)), None)
    if tar is not None and format != _TAR_FORMAT:
        raise InputError(
            f"{tar} is a tar shard, which --format {format} has none of; give --format "
            f"{_TAR_FORMAT}, or the directory of the JSON file."
        )
    readers = tuple(map(open_file, files))
    return RawSource(format=format, fields=fields, files=files, root=root, readers=readers)


def _dataset_files(info: dataset_info.DatasetInfo) -> tuple[Path, ...]:
    """The file of a dataset, or every file of its directory, as LLaMA-Factory reads it."""
    if info.path.is_file():
        return (info.path,)
    found = _candidates(info.path, info.format)
    if not found:
        raise InputError(f"{info.path} has no .json, .jsonl or .parquet file; correct file_name.")
    return tuple(path for files in found.values() for path in _whole(files))


def find_files(source: Path, name: str | None, format: str) -> tuple[Path, ...]:
    """The files to read: one, or the shards of one table or dataset.

    Raises:
        InputError: none is there, there are several to choose from, or shards are missing.
    """
    if source.is_file():
        return (source,)
    if not source.is_dir():
        raise InputError(f"{source} does not exist; give the directory that holds the JSON file.")
    found = _candidates(source, format)
    if name is not None:
        if (source / name).is_file():
            return (source / name,)
        if name not in found:
            close = get_close_matches(name, found, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise InputError(
                f"{source / name} does not exist{meant}; give --json the name of a file there."
            )
        return _whole(found[name])
    if (source / KNOWN_JSON).is_file():
        return (source / KNOWN_JSON,)
    if len(found) == 1:
        return _whole(*found.values())
    if not found:
        other = next(filter(is_other, sorted(source.iterdir())), None)
        if other is not None:
            open_file(other)  # says what it is
        tars = format != _TAR_FORMAT and _tars(source)
        mend = (
            f"its tar shards are read with --format {_TAR_FORMAT}" if tars
            else "name the one to read with --json"
        )  # fmt: skip
        raise InputError(f"{source} has no .json, .jsonl or .parquet file; {mend}.")
    datasets = dataset_info.dataset_names(source)
    other = f", or with --dataset one of: {', '.join(datasets[:20])}" if datasets else ""
    raise InputError(
        f"{source} has {', '.join(found)}; name the one to read with --json{other}."
    )


def _candidates(source: Path, format: str) -> dict[str, tuple[Path, ...]]:
    """What a directory holds to read: the name of a file, or of a table in shards -> its files."""
    found: dict[str, tuple[Path, ...]] = {}
    tables: dict[str, list[Path]] = {}
    try:
        paths = sorted(path for path in source.iterdir() if path.is_file())
    except OSError as error:
        raise InputError(f"{source} cannot be listed ({error}); check the directory.") from error
    if (source / "data").is_dir():  # where Hugging Face repositories have their tables
        paths += sorted((source / "data").glob(f"*{PARQUET}"))
    for path in paths:
        name = path.relative_to(source).as_posix()
        shard = _SHARD.fullmatch(name)
        if shard is not None:
            tables.setdefault(f"{shard[1]}-*-of-{shard[3]}{PARQUET}", []).append(path)
        elif name.endswith((".json", *LINES, PARQUET)) and name != dataset_info.NAME:
            found[name] = (path,)
    found.update({name: tuple(paths) for name, paths in tables.items()})
    if format == _TAR_FORMAT and _tars(source):
        found["*.tar"] = _tars(source)
    return found


def _tars(source: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in source.iterdir() if path.name.lower().endswith(TARS)))


def _whole(files: tuple[Path, ...]) -> tuple[Path, ...]:
    """The shards of a table, all of them.

    Raises:
        InputError: some are missing.
    """
    shards = [_SHARD.fullmatch(path.name) for path in files]
    if shards[0] is None:
        return files
    there = {int(shard[2]) for shard in shards}
    missing = [number for number in range(int(shards[0][3])) if number not in there]
    if missing:
        raise InputError(
            f"{files[0].parent} has {len(files)} of {int(shards[0][3])} shards of {shards[0][1]}, "
            f"without number {missing[0]:05d}; download the others, or name one with --json."
        )
    return files
