"""What flows through the data pipeline: a sample, its integers, a batch of rows.

S tokens a row, B rows a micro-batch, L tokens a sample, P patches, D numbers a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import inf, prod

import numpy as np
import torch
from megatron.energon import Sample
from megatron.energon.edataclass import edataclass

from megatron_vl.data.conversation import Turn
from megatron_vl.data.encode.previews import Preview
from megatron_vl.models.family import Grid
from megatron_vl.models.media import StoredMedia

# Of a RowBatch: what is computed with. The rest says what is where; to read that on a device would
# be to wait for it.
ON_DEVICE = ("position_ids", "pixel_patches")
_BY_VALUE = 1 << 20  # bytes
IGNORE = -100  # the label of a position that is not trained; never a token id, so never the pad id


@edataclass
class ConversationSample(Sample):
    """A prepared sample as its shard tells it: what is said, and where the media are."""

    turns: tuple[Turn, ...]
    media: tuple[StoredMedia, ...]
    read: Callable[[str], bytes]  # a file of the sample, by the extension that `media` names
    tools: str = ""  # see Conversation


@edataclass
class EncodedSample(Sample):
    """One sample as integers; pixels come after packing, and only then are the files read.

    The dunder fields of `Sample` name and restore it.
    """

    name: str  # `shard.tar/key`, after the dataset's name where several are read
    tokens: torch.Tensor  # int64 [L]
    labels: torch.Tensor  # int64 [L], already shifted: the target of each position, or IGNORE
    grids: tuple[Grid, ...]  # of every image and video
    seconds: tuple[float, ...]  # from one frame of each grid to the next: see `Processor.seconds`
    media: tuple[StoredMedia, ...]
    read: Callable[[str], bytes]
    patches: torch.Tensor | None = None  # float32 [P, D] once decoded, of all media in order
    tokens_cut: int = 0  # off its end, which a row did not hold
    dataset: str = ""  # its name, where several are read
    turns: tuple[Turn, ...] = ()
    preview: Preview | None = None  # of one that is shown
    answers: torch.Tensor | None = None  # in validation; bool [L]: see `ModelEncoder.answers`

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    @property
    def num_patches(self) -> int:
        return sum(map(prod, self.grids))


def dataset_name(sources: Sequence | None, datasets: Mapping[str, str]) -> str:
    """Of a sample's sources the dataset, by `datasets` as of `sample_name`; empty without names."""
    if not sources or not datasets:
        return ""
    path = str(sources[0].dataset_path)
    return datasets.get(path, path)


def sample_name(
    sample: Sample | dict, datasets: Mapping[str, str], sources: list | None = None
) -> str:
    """`shard.tar/key`: where a person finds this sample, be it crude or not.

    Args:
        datasets: names that tell datasets apart, by path (`Mixture.names`); they come first.
        sources: where energon has the sample from, if it does not say so itself.
    """
    if isinstance(sample, dict):
        key, sources = sample.get("__key__"), sources or sample.get("__sources__")
    else:
        key = getattr(sample, "__key__", None)
        sources = sources or getattr(sample, "__sources__", None)
    if not sources:
        return str(key)
    dataset = f"{dataset_name(sources, datasets)}/" if datasets else ""
    return f"{dataset}{sources[0].shard_name}/{key}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A sample that could not be trained on."""

    reason: str  # one of a few, to count by: see BadEntry
    sample: str  # `shard.tar/key`
    message: str  # what is wrong with it
    first: bool = True  # in the process that read it; every epoch comes to it again


@dataclass(kw_only=True, slots=True)
class RowBatch:
    """One micro-batch: what the trainer gets.

    Rows are equally long. A row holds one or several samples, each one segment of attention, and
    its padding tail is a segment of its own. `pixel_patches` is None where there is no image in
    the batch or this rank decodes none; the integers are the same on every pipeline stage. Images
    and videos are one sequence, in the order of their tokens: the vision tower tells them apart by
    their frames alone.
    """

    tokens: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S], already shifted: the target of each position, or IGNORE
    loss_mask: torch.Tensor  # float32 [B, S]: 1 where the position is trained
    position_ids: torch.Tensor  # int64 [axes, B, S], the family's axes; every sample starts at 0
    cu_seqlens: torch.Tensor  # int32 [segments + 1]: bounds over the B*S tokens, row after row
    # [P, D] of all images, in order of their tokens; float32, or what the tower computes in
    pixel_patches: torch.Tensor | None
    grid_thw: torch.Tensor  # int64 [images and videos, 3]; [0, 3] where there is none
    sample_keys: list[str]  # names of the samples, in order
    sample_lengths: list[int]  # tokens of every sample, in order; the rest of B*S is padding
    row_tokens: list[int]  # [B], of each row's samples together; its tail is padding
    tokens_cut: list[int] = field(default_factory=list)  # off the end of every sample, in order
    datasets: list[str] = field(default_factory=list)  # of every sample, in order
    answers: torch.Tensor | None = None  # in validation; bool [B, S]: see `ModelEncoder.answers`
    previews: dict[int, Preview] = field(default_factory=dict)  # of those shown, by their number
    skipped: tuple[Skipped, ...] = ()  # samples left out since the reader's batch before this
    __restore_key__: tuple = ()  # set by energon

    @property
    def num_tokens(self) -> int:
        """Of the samples: all B*S but the rows' padding tails."""
        return sum(self.sample_lengths)

    @property
    def num_samples(self) -> int:
        return len(self.sample_keys)

    @property
    def num_images(self) -> int:
        return self.grid_thw.shape[0]

    def pin_memory(self) -> RowBatch:
        return self._map(torch.Tensor.pin_memory, only=ON_DEVICE)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> RowBatch:
        """Positions and pixels on `device`; the integers that say what is where stay on the host.
        """
        return self._map(
            lambda tensor: tensor.to(device, non_blocking=non_blocking), only=ON_DEVICE
        )

    def __getstate__(self) -> dict:
        """Small tensors travel between processes by value: torch would open a file for each."""
        return by_value(self, _BY_VALUE)

    def __setstate__(self, state: dict) -> None:
        for name, value in as_tensors(state).items():
            setattr(self, name, value)

    def _map(self, change, only: Sequence[str]) -> RowBatch:
        values = {name: getattr(self, name) for name in only}
        return replace(self, **{k: change(v) for k, v in values.items() if v is not None})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bits:
    """A tensor of a dtype that numpy has not."""

    dtype: torch.dtype
    bits: np.ndarray  # int16


def by_value(batch: RowBatch, below: float = inf) -> dict:
    """What a batch holds, by name, to be pickled: tensors of the host of fewer than `below` bytes
    as their numbers."""

    def plain(value):
        if not isinstance(value, torch.Tensor) or not value.is_cpu or value.nbytes >= below:
            return value
        if value.dtype == torch.bfloat16:
            return _Bits(dtype=value.dtype, bits=value.view(torch.int16).numpy())
        return value.numpy()

    return {f.name: plain(getattr(batch, f.name)) for f in fields(batch)}


def as_tensors(values: dict) -> dict:
    """What `by_value` gave, with its tensors."""

    def whole(value):
        if isinstance(value, _Bits):
            return torch.from_numpy(value.bits).view(value.dtype)
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    return {name: whole(value) for name, value in values.items()}
