"""Megatron-Core's checkpoints, written and read alike by its releases from 0.16 to 0.19.

They differ in what `save` and `load` take, which their signatures say, and in where they keep what
of a checkpoint is not sharded: in common.pt up to 0.18, and from 0.19 on, where common.pt is still
read, as one more object among the tensors.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Iterator
from pathlib import Path

import torch

_FILE = "common.pt"
_OBJECT = "common_state/shard_0_1"


def install_common_reader() -> None:
    """Let a Megatron-Core that knows common.pt alone find the object too, before its first load."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common

    if not _takes(serialization.load, "common_strategy"):
        return  # 0.19: it looks for both
    holder = getattr(common, "TorchCommonLoadStrategy", serialization)  # of 0.16; of 0.17 and 0.18
    from_file = holder.load_common

    def load_common(*args):
        folder = Path(args[-1])
        return from_file(*args) if (folder / _FILE).is_file() else _read_object(folder)

    holder.load_common = load_common


def begin_save(state: dict, folder: Path, content: dict):
    """Megatron-Core's AsyncRequest to write the sharded `state` into `folder`; all ranks call it.

    `content`: what Megatron-Core is to say of it, as `content_metadata`.
    """
    from megatron.core import dist_checkpointing

    # Its own writer. The default from 0.17 on is that of nvidia-resiliency-ext.
    own = {"async_strategy": "mcore"} if _takes(dist_checkpointing.save, "async_strategy") else {}
    return dist_checkpointing.save(
        state, str(folder), content_metadata=content, async_sharded_save=True, **own
    )


@contextlib.contextmanager
def whole_buckets(optimizer) -> Iterator[None]:
    """Around `optimizer.sharded_state_dict`: the padding of gradient buckets is kept.

    A distributed optimizer's buffer is buckets, each padded at its end. Megatron-Core 0.16 to 0.19
    gathers them without the padding and then cuts out parameters where they are with it: behind
    the first padded bucket each would be saved with numbers of the next, and the last one's end
    with zeros.
    """
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    buffers = [buffer for one in inner for buffer in getattr(one, "buffers", ())]
    sizes = [(buffer, buffer.numel) for buffer in buffers]
    sizes += [(bucket, bucket.grad_data.numel()) for buffer in buffers for bucket in buffer.buckets]
    unpadded = [(part, part.numel_unpadded) for part, _ in sizes]
    try:
        for part, size in sizes:
            part.numel_unpadded = size
        yield
    finally:
        for part, size in unpadded:
            part.numel_unpadded = size


def names_in(folder: Path) -> set[str]:
    """Of a checkpoint's tensors and other objects, which are `name/shard_..`.

    Megatron-Core 0.16 to 0.19 makes each tensor again for this, which torch 2.15 refuses: what it
    keeps of one has strides.
    """
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(folder).read_metadata().state_dict_metadata)


def _takes(function, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def _read_object(folder: Path) -> dict:
    from torch.distributed.checkpoint import FileSystemReader

    places = FileSystemReader(folder).read_metadata().storage_data
    place = next(place for index, place in places.items() if index.fqn == _OBJECT)
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        held = io.BytesIO(file.read(place.length))
    (found,) = torch.load(held, map_location="cpu", weights_only=True)
    return found
