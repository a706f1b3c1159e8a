"""How samples are read: choices a person makes, as frozen data. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.errors import Bounds, InputError
from megatron_vl.models.media import BOUNDS as MEDIA

_TOKENS = Bounds(least=1, most=2**24)
BOUNDS = MEDIA | {  # of the numbers that this room is told
    "seq_length": _TOKENS, "max_padding_length": _TOKENS,
    "row_multiple": _TOKENS,
    "micro_batch_size": Bounds(least=1, most=2**20),
    "num_workers": Bounds(least=0, most=1024),
    "packing_buffer_size": Bounds(least=0, most=10**6),
    "shuffle_buffer_size": Bounds(least=0, most=10**9),
    "max_samples_per_sequence": Bounds(least=1, most=10**9),
    "max_patches_per_row": Bounds(least=1, most=2**31 - 1),
    "max_skipped_samples": Bounds(least=0, most=10**12),
    "max_samples": Bounds(least=1, most=10**12),
    "seed": Bounds(least=0, most=2**32 - 1),  # torch takes more, numpy does not
}  # fmt: skip


def row_length(seq_length: int, max_padding_length: int | None, *, packs: bool) -> int:
    """Tokens that a row holds: seq-length when samples are packed, else max-padding-length."""
    return seq_length if packs else max_padding_length or seq_length


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedText:
    """Which text is trained. By default the assistant's turns, each with its end token.

    Raises:
        InputError: both at once.
    """

    train_on_prompt: bool = False  # everything is: system, questions and the template's own words
    mask_history: bool = False  # of the assistant's turns only the last is

    def __post_init__(self) -> None:
        if self.train_on_prompt and self.mask_history:
            raise InputError("train-on-prompt and mask-history exclude one another; give one.")
