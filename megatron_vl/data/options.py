"""How samples are read: choices a person makes, as frozen data. Pure Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vl.errors import InputError


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
    video_positions: str = "published"  # of text after a video: see megatron_vl.models.common.mrope

    def __post_init__(self) -> None:
        for kind in ("image", "video"):
            least, most = (getattr(self, f"{kind}_{end}_pixels") for end in ("min", "max"))
            for end, value in (("min", least), ("max", most)):
                if value is not None and value < 1:
                    raise InputError(f"{kind}-{end}-pixels is {value}; give at least 1.")
            if least is not None and most is not None and least > most:
                raise InputError(
                    f"{kind}-min-pixels {least} is above {kind}-max-pixels {most}; swap them."
                )
        if not self.video_fps > 0 or math.isinf(self.video_fps):
            raise InputError(f"video-fps is {self.video_fps}; give a number above 0.")
        if self.video_maxlen < 1:
            raise InputError(f"video-maxlen is {self.video_maxlen}; give at least 1.")


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
