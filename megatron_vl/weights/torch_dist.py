"""The weights of a `torch_dist` checkpoint (megatron.core.dist_checkpointing) by byte range.

`.metadata` is a pickle of torch.distributed.checkpoint's table: the global tensors, the chunks each
is cut into, and the file and byte range of every chunk. It is read as data, so nothing in it is
called. A chunk is a torch.save file inside a `.distcp` file, opened like any other. No process
group, no Megatron-Core; torch only to write `.metadata`, of which its classes are the format.
"""

from __future__ import annotations

import collections
import functools
import io
import itertools
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vl.errors import InputError
from megatron_vl.pickles import DataOnly, Unpickler
from megatron_vl.weights.dtypes import WEIGHTS, DType
from megatron_vl.weights.files import TensorAt, reserve
from megatron_vl.weights.map import Stored, TensorPart, WeightMap
from megatron_vl.weights.rules import Piece
from megatron_vl.weights.torch_file import (
    BROKEN,
    Section,
    lay_out_tensor,
    lay_out_torch_file,
    open_torch_file,
    read_archive,
)

COMMON = "common_state/shard_0_1"  # common.pt of Megatron-Core 0.19, as torch knows it
NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state", "opt_param_scheduler", "chained_")

Id = tuple[str, str, str]
Box = tuple[tuple[int, ...], tuple[int, ...]]  # (start, extents)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One global tensor."""

    dtype: str  # torch's name
    size: tuple[int, ...]
    chunks: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class _Range:
    """The bytes of one chunk."""

    file: str
    offset: int
    length: int
    plain: bool  # neither compressed nor changed in another way


@dataclass(frozen=True, slots=True)
class _Table:
    entries: Mapping[str, _Entry]
    places: Mapping[tuple[str, tuple[int, ...]], _Range]  # of (name, a chunk's start)
    objects: Mapping[str, _Range]  # what is no tensor, by its name and shard


def read_common(path: Path) -> dict:
    """What of a checkpoint is not sharded: its arguments, its layout, how far it is.

    Megatron-Core up to 0.18 keeps it in common.pt, from 0.19 on in a `.distcp` file.

    Raises:
        InputError: it is missing or unreadable.
    """
    file = path / "common.pt"
    if file.is_file():
        found = open_torch_file(file)
    else:
        section = common_section(path)
        file = Path(section.file.name)
        try:
            with section.file:
                (found,) = read_archive(section, file, section.offset)
        except BROKEN as error:
            raise InputError(f"{file} is broken at {COMMON}; copy the checkpoint again.") from error
    if not isinstance(found, dict):
        raise InputError(
            f"{file} does not say the checkpoint's arguments and layout; copy the checkpoint again."
        )
    return found


def common_section(path: Path) -> Section:
    """Where a checkpoint without common.pt keeps that: a torch.save file of a list of one dict.

    Raises:
        InputError: it has neither, or not where its table says.
    """
    place = _read_table(path).objects.get(COMMON)
    if place is None:
        raise InputError(
            f"{path} has neither common.pt nor {COMMON} in its .metadata, so its layout, arguments "
            f"and random state are not known; copy the checkpoint again."
        )
    return Section(_file_of(path, COMMON, place).open("rb"), place.offset, place.length)


def _read_table(path: Path) -> _Table:
    """The table of contents of a checkpoint's directory.

    Raises:
        InputError: it is missing or unreadable.
    """
    file = path / ".metadata"
    try:
        with file.open("rb") as opened:
            table = Unpickler(opened).load()
        ranges = [(index.fqn, getattr(index, "offset", None), _Range(
            str(place.relative_path), int(place.offset), int(place.length),
            not getattr(place, "transform_descriptors", None),
        )) for index, place in table.storage_data.items()]
        return _Table(
            {name: _Entry(
                _dtype(entry.properties), tuple(entry.size),
                tuple((tuple(one.offsets), tuple(one.sizes)) for one in entry.chunks),
            ) for name, entry in table.state_dict_metadata.items() if hasattr(entry, "chunks")},
            {(name, tuple(at)): place for name, at, place in ranges if at is not None},
            {name: place for name, at, place in ranges if at is None},
        )
    except BROKEN as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"{file} is unreadable ({reason}); copy the checkpoint again.") from error


def _dtype(properties: Any) -> str:
    """TensorProperties pickles itself as a tuple that begins with the dtype."""
    dtype = properties.state[0] if hasattr(properties, "state") else properties.dtype
    return dtype.__name__


def open_torch_dist(
    path: Path, weights: WeightMap
) -> tuple[list[Stored], dict[tuple[str, str, str], TensorAt]]:
    """(inventory of the chunks, where each lies) of a checkpoint's weights.

    Optimizer and random state, and whatever is no tensor, are left out.

    Raises:
        InputError: gaps, surpluses, wrong shapes or missing files, named.
    """
    table = _read_table(path)
    entries = {name: entry for name, entry in table.entries.items()
               if not name.startswith(NOT_WEIGHTS)}
    inventory = weights.global_inventory({name: e.size for name, e in entries.items()})
    chunks: dict[tuple[str, tuple[int, ...]], list[Piece]] = {}
    sizes_of = {name: dict(entry.chunks) for name, entry in entries.items()}
    near = functools.cache(lambda name: _Near(entries[name].chunks))
    checked: set[str] = set()
    for stored in inventory:
        entry = entries[stored.name]
        if entry.size != stored.shape:
            raise InputError(
                f"{path}: {stored.name} has shape {list(entry.size)} but config.json asks for "
                f"{list(stored.shape)}; use the config.json the checkpoint was made with."
            )
        if entry.dtype not in WEIGHTS:
            raise InputError(
                f"{path}: {stored.name} has dtype {entry.dtype}; only {', '.join(WEIGHTS)} are "
                f"supported, convert it first."
            )
        if stored.name not in checked:
            checked.add(stored.name)
            if _overlap(entry.chunks):
                raise InputError(f"{path}: chunks of {stored.name} overlap; copy it again.")
        for piece in stored.pieces:
            for offsets, sizes in near(stored.name)(piece):
                if clipped := _clip(piece, offsets, sizes):
                    chunks.setdefault((stored.name, offsets), []).append(clipped)
    opened = _Chunks(path, table.places)
    stored_chunks, tensors = [], {}
    for (name, offsets), pieces in chunks.items():
        sizes = sizes_of[name][offsets]
        file, at = opened(name, offsets, sizes, WEIGHTS[entries[name].dtype])
        one = Stored(file=file, part="", name=f"{name}@{','.join(map(str, offsets))}", shape=sizes,
                     pieces=tuple(pieces))
        stored_chunks.append(one)
        tensors[one.id] = at
    return stored_chunks, tensors


def _overlap(chunks: tuple[Box, ...]) -> bool:
    """Whether two boxes have an element in common; most differ in the first dimension alone."""
    open_: list[Box] = []
    for start, extents in sorted(chunks):
        open_ = [(low, sizes) for low, sizes in open_ if low[:1] and low[0] + sizes[0] > start[0]]
        for low, sizes in open_:
            if all(a < b + m and b < a + n for a, n, b, m in
                   zip(start, extents, low, sizes, strict=True)):
                return True
        open_.append((start, extents))
    return False


class _Near:
    """The chunks that may hold part of a piece; of stacked layers or experts, those of its own."""

    def __init__(self, chunks: tuple[Box, ...]) -> None:
        self.chunks, self.by_front = chunks, {}

    def __call__(self, piece: Piece) -> Iterable[Box]:
        front = len(piece.at) - len(piece.shape)
        if not front:
            return self.chunks
        if front not in self.by_front:
            self.by_front[front] = self._sorted(front)
        found = self.by_front[front]
        return found[piece.at[:front]] + found[None]

    def _sorted(self, front: int) -> Mapping[tuple[int, ...] | None, list[Box]]:
        """By their place in the first `front` dimensions; None: of those larger there than one."""
        found = collections.defaultdict(list)
        for offsets, sizes in self.chunks:
            is_one = sizes[:front] == (1,) * front
            found[offsets[:front] if is_one else None].append((offsets, sizes))
        return found


def _clip(piece: Piece, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Piece | None:
    """The part of `piece` that lies in one chunk, placed from the chunk's start."""
    front = len(piece.at) - len(piece.shape)
    extents = (*(1,) * front, *piece.shape)
    low = [max(a, o) for a, o in zip(piece.at, offsets, strict=True)]
    high = [min(a + n, o + m) for a, n, o, m in zip(piece.at, extents, offsets, sizes, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    moved = [a - b for a, b in zip(low, piece.at, strict=True)][front:]
    return replace(
        piece,
        start=tuple(s + m for s, m in zip(piece.start, moved, strict=True)),
        at=tuple(a - o for a, o in zip(low, offsets, strict=True)),
        shape=tuple(b - a for a, b in zip(low[front:], high[front:], strict=True)),
    )


def _file_of(path: Path, name: str, place: _Range | None) -> Path:
    """The file of a range. Raises InputError: it is not plain, not there, or not the checkpoint's.
    """
    if place is not None and Path(place.file).name != place.file:
        raise InputError(
            f"{path}: .metadata looks for {name} in {place.file}, outside the checkpoint; do not "
            f"use it."
        )
    if place is None or not place.plain:
        raise InputError(
            f"{path}: .metadata gives no plain place for {name}; copy the checkpoint again, or "
            f"save it without compression."
        )
    file = path / place.file
    if not file.is_file() or file.stat().st_size < place.offset + place.length:
        raise InputError(f"{file} is missing or cut short; copy the checkpoint again.")
    return file


class _Chunks:
    """Finds where a chunk's numbers start inside its `.distcp` file."""

    def __init__(self, path: Path, places: Mapping[tuple[str, tuple[int, ...]], _Range]) -> None:
        self.path, self.places = path, places
        self.open = functools.cache(lambda file: file.open("rb"))

    def __call__(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: DType
    ) -> tuple[str, TensorAt]:
        place = self.places.get((name, offsets))
        file = _file_of(self.path, name, place)
        section = Section(self.open(file), place.offset, place.length)
        try:
            at = read_archive(section, file, place.offset)
        except BROKEN as error:
            raise InputError(f"{file} is broken at {name}; copy the checkpoint again.") from error
        if not isinstance(at, TensorAt) or (at.shape, at.dtype) != (sizes, dtype):
            raise InputError(f"{file}: {name} is not what .metadata says; copy it again.")
        return place.file, at


# ---- before others read it ----------------------------------------------------------------------

_TABLE_NAMES = frozenset({
    ("collections", "OrderedDict"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64",
        "int32", "int16", "int8", "uint8", "bool",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata",
        "ChunkStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    )),
    *(("torch.distributed.checkpoint.planner", name) for name in (
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
    )),
})


def check_data_only(path: Path, part: int = 0, parts: int = 1) -> None:
    """Whether a checkpoint can be read by torch and Megatron-Core without running code of its own.

    Both run the pickle of `.metadata` and of every object that is no tensor, whatever they name.

    Args:
        part: of `parts`, which of the objects are looked at; `.metadata` always is.

    Raises:
        InputError: a pickle names what no checkpoint needs, or a file is outside the checkpoint.
    """
    import torch

    def refuse(file: Path, error: Exception) -> InputError:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        return InputError(
            f"{file} holds more than data ({reason}); do not use this checkpoint, or ask who made "
            f"it."
        )

    for other in path.glob("__*.metadata"):
        # torch turns to these when it cannot read `.metadata`, and they are no part of a run's own.
        raise refuse(other, ValueError("a second table"))
    if not (path / ".metadata").is_file():
        return  # of the torch format, which is read as data anyway
    objects, files = [], set()
    try:
        with (path / ".metadata").open("rb") as file:
            table = DataOnly(file, _TABLE_NAMES).load()
        for index, place in table.storage_data.items():
            files.add(str(place.relative_path))
            # All but tensors: torch goes by the class, and takes one of several places of a name.
            if type(table.state_dict_metadata[index.fqn]).__name__ != "TensorStorageMetadata":
                objects.append((str(index.fqn), str(place.relative_path), int(place.offset),
                                int(place.length)))
                if getattr(place, "transform_descriptors", None):
                    raise ValueError(f"{index.fqn} is not stored as it is")
    except BROKEN as error:
        raise refuse(path / ".metadata", error) from error
    for name in files:
        if Path(name).name != name:
            raise refuse(path / ".metadata", ValueError(f"it reads {name}, outside of it"))
    for name, file, offset, length in sorted(objects)[part::parts]:
        try:
            with (path / file).open("rb") as opened:
                opened.seek(offset)
                torch.load(io.BytesIO(opened.read(length)), map_location="cpu", weights_only=True)
        except BROKEN as error:
            raise refuse(path / file, ValueError(f"{name}: {error}")) from error


# ---- writing ------------------------------------------------------------------------------------


def lay_out_torch_dist(
    directory: Path,
    files: Mapping[str, Sequence[Stored]],
    dtypes: Mapping[Id, DType],
    chunks: Mapping[str, TensorPart],
    common: Mapping[str, Any],
) -> dict[Id, TensorAt]:
    """Writes one iteration's directory with room for its weights; answers where each lies.

    Args:
        files: the parts of tensors that each `.distcp` file gets.
        chunks: of which tensor each of them is a part, by the part's name.
        common: what common.pt says.
    """
    directory.mkdir(parents=True)
    lay_out_torch_file(directory / "common.pt", common, {})
    (directory / "metadata.json").write_text(json.dumps({
        "sharded_backend": "torch_dist", "sharded_backend_version": 1,
        "common_backend": "torch", "common_backend_version": 1,
    }))
    tensors, ranges = {}, {}
    for name, group in files.items():
        with (directory / name).open("wb") as file:
            for stored in group:
                start, chunk = file.tell(), chunks[stored.name]
                shape = (*(1 for _ in chunk.at), *stored.shape)
                at = lay_out_tensor(file, directory / name, dtypes[stored.id], shape)
                tensors[stored.id] = replace(at, shape=stored.shape)
                ranges[stored.name] = name, start, file.tell() - start
            reserve(file, file.tell())
    _write_table(directory / ".metadata", files, dtypes, chunks, ranges)
    return tensors


def _write_table(path: Path, files, dtypes, chunks: Mapping[str, TensorPart], ranges) -> None:
    # Imported here: they take seconds, and only writing this format needs them.
    import torch
    from torch.distributed.checkpoint import metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries, places = {}, {}
    for stored in itertools.chain.from_iterable(files.values()):
        chunk, (file, start, length) = chunks[stored.name], ranges[stored.name]
        sizes = torch.Size((*(1 for _ in chunk.at), *stored.shape))
        offsets = torch.Size((*chunk.at, *(0 for _ in stored.shape)))
        if chunk.name not in entries:
            entries[chunk.name] = metadata.TensorStorageMetadata(
                properties=metadata.TensorProperties(
                    dtype=getattr(torch, dtypes[stored.id].name)
                ),
                size=torch.Size((*chunk.stack, *stored.shape)), chunks=[],
            )
        known = entries[chunk.name].chunks
        places[metadata.MetadataIndex(chunk.name, offsets, len(known))] = _StorageInfo(
            relative_path=file, offset=start, length=length
        )
        known.append(metadata.ChunkStorageMetadata(offsets=offsets, sizes=sizes))
    table = metadata.Metadata(state_dict_metadata=entries, storage_data=places)
    with path.open("wb") as file:
        pickle.dump(table, file)
