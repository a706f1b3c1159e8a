"""torch.save files opened for their table of contents: no tensor is read, no pickled code is run.

torch's weights-only reader builds tensors and plain containers and refuses every other class. What
other tools put next to the weights (enums, numpy state) is replaced by `Opaque` under its own name,
so it is carried and never called.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megatron_vl.errors import InputError
from megatron_vl.weights.files import TensorAt


class Opaque:
    """Stands for an object of a class that is not a weight; it keeps nothing."""

    def __new__(cls, *_args, **_kwargs):
        return super().__new__(cls)

    def __init__(self, *_args, **_kwargs) -> None:
        pass

    def __setstate__(self, _state) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


def load_torch_file(path: Path, *, mmap: bool = True) -> Any:
    """The file's content with tensors mapped from disk.

    Raises:
        InputError: the file is missing, cut short or no torch file.
    """
    return _load(path, mmap=mmap and zipfile.is_zipfile(path))


def open_torch_file(path: Path) -> Any:
    """The file's content with a `TensorAt` for every tensor.

    Raises:
        InputError: the file is missing, cut short or no torch file.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; copy it again.")
    if not zipfile.is_zipfile(path):
        return _located(_load(path), None, path)  # torch's format before 1.6 has no places
    with noting_offsets():
        placed = _load(path, map_location="meta")
    # Tensors that are no contiguous run of bytes are rare; only for them the file is mapped.
    return _located(placed, functools.cache(lambda: _load(path, mmap=True)), path)


def noting_offsets() -> contextlib.AbstractContextManager:
    """Loads onto the meta device in here read no numbers but note where they lie."""
    if _meta_loads_note_offsets():
        return contextlib.nullcontext()
    # Imported here: it takes seconds, and only older torch needs it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@functools.cache
def _meta_loads_note_offsets() -> bool:
    """Torch 2.8, and no doubt others before 2.13, note offsets for fake tensors alone."""
    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    return storage_offset(torch.load(file, weights_only=True, map_location="meta")) is not None


def storage_offset(tensor: torch.Tensor) -> int | None:
    """Where a tensor's storage starts in the file; noted by a load in `noting_offsets`."""
    return tensor.untyped_storage()._checkpoint_offset


def _load(path: Path, **options) -> Any:
    if not path.is_file():
        raise InputError(f"{path} is missing; copy it again.")
    try:
        stubs = [(Opaque, name) for name in _unknown(path)]
        with safe_globals([argparse.Namespace, *stubs]):
            return torch.load(path, **{"map_location": "cpu", "weights_only": True, **options})
    except Exception as error:
        # torch raises many types for a broken file; all mean the same to the person who has it.
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(
            f"{path} cannot be read as a torch file ({reason}); copy or download it again."
        ) from error


def _unknown(path: Path) -> list[str]:
    if not zipfile.is_zipfile(path):
        return []
    names = get_unsafe_globals_in_checkpoint(path)
    return [name for name in names if name != "argparse.Namespace"]


def _located(value: Any, real: Callable[[], Any] | None, path: Path) -> Any:
    """`value` with places for tensors; `real` opens the same content with true tensors."""
    if isinstance(value, dict):
        return {
            key: _located(one, real and (lambda key=key: real()[key]), path)
            for key, one in value.items()
        }
    if not isinstance(value, torch.Tensor):
        return value
    shape = tuple(value.shape)
    if real is not None and value.is_contiguous():
        start = storage_offset(value)
        return TensorAt(path=path, offset=start + value.storage_offset() * value.element_size(),
                        dtype=value.dtype, shape=shape)
    loaded = value if real is None else real()
    return TensorAt(path=path, offset=0, dtype=value.dtype, shape=shape, loaded=loaded)
