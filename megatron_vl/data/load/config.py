"""What is read of a run's data, and how rows are made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.load.task_encoder import RowRules
from megatron_vl.data.options import BOUNDS, TrainedText, row_length
from megatron_vl.errors import InputError, check_bounds
from megatron_vl.models.media import MediaLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What to read and how to lay it out.

    Raises:
        InputError: sizes that contradict one another.
    """

    train: Mixture | None  # datasets `megatron-vl prepare` wrote
    valid: Mixture | None = None  # their validation splits are read; None: nothing to validate on
    seq_length: int  # tokens of a row when samples are packed
    truncate_samples: bool = False  # cut text off a longer sample's end, instead of skipping it
    max_padding_length: int | None = None  # tokens of a row at most when not; None: seq_length
    row_multiple: int | None = None  # not packed, a batch's rows end behind the longest, at a
    # multiple of this; None: all have max_padding_length
    micro_batch_size: int = 1  # rows
    num_workers: int = 1  # processes that read for one rank; 0 reads in the training process
    packing_buffer_size: int | None = 1024  # samples to pack rows from; None or 0: one a row
    shuffle_buffer_size: int = 100  # samples to draw from; 0 keeps the shards' order
    max_samples_per_sequence: int | None = 100  # neighbours read in one go before changing place
    max_patches_per_row: int | None = None  # evens the vision tower's cost out; None: no limit
    max_skipped_samples: int = 0  # unusable samples a reading process skips before it is an error
    media: MediaLimits = field(default_factory=MediaLimits)
    trained: TrainedText = field(default_factory=TrainedText)
    pixel_dtype: torch.dtype = torch.float32  # that of the vision tower, which would cast them
    seed: int = 1234

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)
        if self.max_padding_length is not None and self.max_padding_length > self.seq_length:
            raise InputError(
                f"the padding length {self.max_padding_length} is above the sequence length "
                f"{self.seq_length}; give at most {self.seq_length}."
            )

    @property
    def packs(self) -> bool:
        return bool(self.packing_buffer_size)

    @property
    def row_length(self) -> int:
        return row_length(self.seq_length, self.max_padding_length, packs=self.packs)

    @property
    def rules(self) -> RowRules:
        """What makes a row."""
        return RowRules(
            length=self.row_length, truncates=self.truncate_samples, packs=self.packs,
            length_option=self.length_option,
            multiple=None if self.packs else self.row_multiple,
            max_patches=self.max_patches_per_row, max_skipped=self.max_skipped_samples,
            pixel_dtype=self.pixel_dtype,
        )

    @property
    def length_option(self) -> str:
        """The option that says `row_length`, for messages."""
        padded = not self.packs and self.max_padding_length is not None
        return "max-padding-length" if padded else "seq-length"
