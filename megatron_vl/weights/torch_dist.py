"""Reads the weights of a `torch_dist` checkpoint (megatron.core.dist_checkpointing) by byte range.

`.metadata` is a pickle of torch.distributed.checkpoint's table: the global tensors, the chunks each
is cut into, and the file and byte range of every chunk. It is read by an unpickler that knows those
classes only; any other name becomes an `Opaque` and nothing is called. A chunk is a torch.save
file inside a `.distcp` file, opened like any other. No process group, no Megatron-Core.
"""

from __future__ import annotations

import collections
import functools
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_vl.errors import InputError
from megatron_vl.weights.files import TensorAt
from megatron_vl.weights.map import Stored, WeightMap
from megatron_vl.weights.rules import Piece
from megatron_vl.weights.torch_file import Opaque, load_torch_file, noting_offsets, storage_offset

NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state", "opt_param_scheduler", "chained_")

_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
    for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
                 "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")
    if hasattr(metadata, name)
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch.distributed.checkpoint.planner", "WriteItemType"): planner.WriteItemType,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _CLASSES.get((module, name), Opaque)


def read_common(path: Path) -> dict:
    """The checkpoint's common.pt: what is not sharded."""
    common = path / "common.pt"
    if not common.is_file():
        return {}
    found = load_torch_file(common, mmap=False)
    return found if isinstance(found, dict) else {}


def read_metadata(path: Path) -> metadata.Metadata:
    """The table of contents of a checkpoint's directory.

    Raises:
        InputError: it is missing or unreadable.
    """
    file = path / ".metadata"
    try:
        with file.open("rb") as opened:
            table = _MetadataUnpickler(opened).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError,
            IndexError, KeyError) as error:
        raise InputError(f"{file} is unreadable ({error}); copy the checkpoint again.") from error
    if not isinstance(table, metadata.Metadata) or not isinstance(table.storage_data, dict):
        raise InputError(f"{file} is not a table of contents; copy the checkpoint again.")
    return table


def open_torch_dist(
    path: Path, weights: WeightMap
) -> tuple[list[Stored], dict[tuple[str, str, str], TensorAt]]:
    """(inventory of the chunks, where each lies) of a checkpoint's weights.

    Optimizer and random state, and whatever is no tensor, are left out.

    Raises:
        InputError: gaps, surpluses, wrong shapes or missing files, named.
    """
    table = read_metadata(path)
    entries = {
        name: entry for name, entry in table.state_dict_metadata.items()
        if isinstance(entry, metadata.TensorStorageMetadata) and not name.startswith(NOT_WEIGHTS)
    }
    inventory = weights.global_inventory({name: tuple(e.size) for name, e in entries.items()})
    chunks: dict[tuple[str, tuple[int, ...]], list[Piece]] = {}
    sizes_of = {name: dict(_chunk_boxes(entry)) for name, entry in entries.items()}
    near = functools.cache(lambda name: _Near(entries[name]))
    for stored in inventory:
        entry = entries[stored.name]
        if tuple(entry.size) != stored.shape:
            raise InputError(
                f"{path}: {stored.name} has shape {list(entry.size)} but config.json asks for "
                f"{list(stored.shape)}; use the config.json the checkpoint was made with."
            )
        for piece in stored.pieces:
            for offsets, sizes in near(stored.name)(piece):
                if clipped := _clip(piece, offsets, sizes):
                    chunks.setdefault((stored.name, offsets), []).append(clipped)
    opened = _Chunks(path, table)
    stored_chunks, tensors = [], {}
    for (name, offsets), pieces in chunks.items():
        sizes = sizes_of[name][offsets]
        file, at = opened(name, offsets, sizes, entries[name].properties.dtype)
        one = Stored(file=file, part="", name=f"{name}@{','.join(map(str, offsets))}", shape=sizes,
                     pieces=tuple(pieces))
        stored_chunks.append(one)
        tensors[one.id] = at
    return stored_chunks, tensors


def _chunk_boxes(entry: metadata.TensorStorageMetadata):
    return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]


class _Near:
    """The chunks that may hold part of a piece; of stacked layers, those of the piece's layer."""

    def __init__(self, entry: metadata.TensorStorageMetadata) -> None:
        self.by_first = collections.defaultdict(list)
        for offsets, sizes in _chunk_boxes(entry):
            self.by_first[offsets[0] if sizes[0] == 1 else None].append((offsets, sizes))

    def __call__(self, piece: Piece) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        if len(piece.at) == len(piece.shape):
            return [one for some in self.by_first.values() for one in some]
        return self.by_first[piece.at[0]] + self.by_first[None]


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


class _Chunks:
    """Finds where a chunk's numbers start inside its `.distcp` file."""

    def __init__(self, path: Path, table: metadata.Metadata) -> None:
        self.path = path
        self.places = {
            (index.fqn, tuple(index.offset)): info for index, info in table.storage_data.items()
            if index.offset is not None
        }
        self.open = functools.cache(lambda file: file.open("rb"))

    def __call__(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[str, TensorAt]:
        place = self.places.get((name, offsets))
        if place is None or getattr(place, "transform_descriptors", None):
            raise InputError(
                f"{self.path}: .metadata gives no plain place for {name}; copy the checkpoint "
                f"again, or save it without compression."
            )
        file = self.path / place.relative_path
        if not file.is_file() or file.stat().st_size < place.offset + place.length:
            raise InputError(f"{file} is missing or cut short; copy the checkpoint again.")
        view = _View(self.open(file), place.offset, place.length)
        try:
            with noting_offsets():
                tensor = torch.load(view, weights_only=True, map_location="meta")
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise InputError(f"{file} is broken at {name}; copy the checkpoint again.") from error
        if tuple(tensor.shape) != sizes or tensor.dtype != dtype or not tensor.is_contiguous():
            raise InputError(f"{file}: {name} is not what .metadata says; copy it again.")
        within = tensor.storage_offset() * tensor.element_size()
        offset = place.offset + storage_offset(tensor) + within
        return place.relative_path, TensorAt(path=file, offset=offset, dtype=dtype, shape=sizes)


class _View(io.RawIOBase):
    """Bytes [offset, offset + length) of an open file, as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        super().__init__()
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        self.at = base + to
        return self.at

    def readinto(self, buffer) -> int:
        self.file.seek(self.offset + self.at)
        wanted = min(len(buffer), max(0, self.length - self.at))
        got = self.file.readinto(memoryview(buffer)[:wanted])
        self.at += got
        return got

