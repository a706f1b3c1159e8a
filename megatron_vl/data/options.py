"""How samples are read: choices a person makes, as frozen data. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.errors import Bounds, InputError, check_bounds

_PIXELS = Bounds(least=1, most=2**31 - 1)
_TOKENS = Bounds(least=1, most=2**24)
BOUNDS = {  # of the numbers that this room is told
    "image_min_pixels": _PIXELS, "image_max_pixels": _PIXELS,
    "video_min_pixels": _PIXELS, "video_max_pixels": _PIXELS,
    "video_fps": Bounds(above=0, most=10**6),
    "video_maxlen": Bounds(least=1, most=10**6),
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


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaLimits:
    """Sizes that media are brought to. None: what the model's own files say.

    Raises:
        InputError: limits that contradict one another.
    """

    image_min_pixels: int | None = None  # of an image after resizing
    image_max_pixels: int | None = None
    video_min_pixels: int | None = None  # of each frame after resizing
    video_max_pixels: int | None = None
    video_fps: float = 2.0  # frames taken from a second of video
    video_maxlen: int = 128  # frames taken from one video at most
    video_positions: str = "published"  # of text after a video: see Family.positions

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)
        for kind in ("image", "video"):
            least, most = (getattr(self, f"{kind}_{end}_pixels") for end in ("min", "max"))
            if least is not None and most is not None and least > most:
                raise InputError(
                    f"{kind}-min-pixels {least} is above {kind}-max-pixels {most}; swap them."
                )


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
