"""What flows through the data pipeline: a conversation, an encoded sample, a batch of rows.

S tokens a row, B rows a micro-batch, L tokens a sample, P patches, D numbers a patch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from megatron.energon import Sample
from megatron.energon.edataclass import edataclass

_BY_VALUE = 1 << 20  # bytes
IGNORE = -100  # the label of a position that is not trained; never a token id, so never the pad id


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A stretch of one turn: text, or the place of one image."""

    text: str | None = None  # None where an image stands


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str  # "system", "user" or "assistant"
    parts: tuple[Part, ...]

    @property
    def num_images(self) -> int:
        return sum(part.text is None for part in self.parts)

    def message(self) -> dict:
        """The turn as a chat template takes it."""
        content = [
            {"type": "image"} if part.text is None else {"type": "text", "text": part.text}
            for part in self.parts
        ]
        return {"role": self.role, "content": content}


@edataclass
class EncodedSample(Sample):
    """One sample as integers; pixels come after packing.

    The dunder fields of `Sample` name and restore it.
    """

    tokens: torch.Tensor  # int64 [L]
    labels: torch.Tensor  # int64 [L], already shifted: the target of each position, or IGNORE
    position_ids: torch.Tensor  # int64 [3, L]
    grids: torch.Tensor  # int64 [images, 3]: frames, rows, columns of patches
    images: tuple[bytes, ...]  # the files' own bytes; empty once decoded
    patches: torch.Tensor | None = None  # float32 [P, D] once decoded

    @property
    def name(self) -> str:
        return sample_name(self)


def sample_name(sample) -> str:
    """`shard.tar/key`: where a person finds this sample."""
    sources = sample.__sources__
    shard = f"{sources[0].shard_name}/" if sources else ""
    return f"{shard}{sample.__key__}"


@dataclass(kw_only=True, slots=True)
class RowBatch:
    """One micro-batch: what the trainer gets.

    Rows are equally long. A row holds one or several samples, each one segment of attention, and
    its padding tail is a segment of its own. `pixel_patches` is None where there is no image in
    the batch or this rank decodes none; the integers are the same on every pipeline stage.
    """

    tokens: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S], already shifted: the target of each position, or IGNORE
    loss_mask: torch.Tensor  # float32 [B, S]: 1 where the position is trained
    position_ids: torch.Tensor  # int64 [3, B, S]: time, height, width; every sample starts at 0
    cu_seqlens: torch.Tensor  # int32 [segments + 1]: bounds over the B*S tokens, row after row
    pixel_patches: torch.Tensor | None  # float32 [P, D] of all images, in order of their tokens
    grid_thw: torch.Tensor  # int64 [images, 3]; [0, 3] where there is none
    sample_keys: list[str]  # `shard.tar/key` of every sample, in order
    num_tokens: int  # of the samples: all B*S but the rows' padding tails
    __restore_key__: tuple = ()  # set by energon

    @property
    def num_samples(self) -> int:
        return len(self.sample_keys)

    @property
    def num_images(self) -> int:
        return self.grid_thw.shape[0]

    def pin_memory(self) -> RowBatch:
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> RowBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def __getstate__(self) -> dict:
        """Small tensors travel between processes by value: torch would open a file for each."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: value.numpy()
            if isinstance(value, torch.Tensor) and value.is_cpu and value.nbytes < _BY_VALUE
            else value
            for name, value in values.items()
        }

    def __setstate__(self, state: dict) -> None:
        for name, value in state.items():
            value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            setattr(self, name, value)

    def _map(self, change) -> RowBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self,
            **{k: change(v) for k, v in values.items() if isinstance(v, torch.Tensor)},
        )
