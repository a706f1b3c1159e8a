"""Images and videos as data and families both speak of them. Pure Python.

`StoredMedia` is one of them in a shard, `MediaLimits` what a run brings its media to, and
`MediaSettings` what an entry asks for one of its own, under qwen-vl-utils' names. What an entry
asks for stands above the run's options and the model's files: whoever wrote it knows the image.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields

from megatron_vl.errors import Bounds, InputError, check_bounds

IMAGE, VIDEO = "image", "video"
MEDIA_KINDS = (IMAGE, VIDEO)
_PIXELS = Bounds(least=1, most=2**31 - 1)
BOUNDS = {  # of a run's limits
    "image_min_pixels": _PIXELS, "image_max_pixels": _PIXELS,
    "video_min_pixels": _PIXELS, "video_max_pixels": _PIXELS,
    "video_fps": Bounds(above=0, most=10**6),
    "video_maxlen": Bounds(least=1, most=10**6),
}  # fmt: skip
# The limits of Qwen's own processors, which preparing keeps to: it is done for no family.
MAX_ASPECT_RATIO = 200  # of the longer side to the shorter; transformers' smart_resize's
MIN_FRAMES = 4  # qwen-vl-utils' FPS_MIN_FRAMES, transformers' Qwen2VLVideoProcessor.min_frames
FRAMES_A_PATCH = 2  # temporal_patch_size
MAX_FPS = 10**6
PIXEL_KEYS = ("resized_height", "resized_width", "min_pixels", "max_pixels")
FRAME_KEYS = ("nframes", "fps", "min_frames", "max_frames", "video_start", "video_end")
_MOST = 1 << 31  # of a whole number


class BadMedia(ValueError):
    """Bytes that are no readable image or video; the caller says which sample."""


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
        for kind in MEDIA_KINDS:
            least, most = (getattr(self, f"{kind}_{end}_pixels") for end in ("min", "max"))
            if least is not None and most is not None and least > most:
                raise InputError(
                    f"{kind}-min-pixels {least} is above {kind}-max-pixels {most}; swap them."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaSettings:
    """Sizes and frames of one image or video; None: the run's.

    Raises:
        ValueError: values that are none, or exclude one another.
    """

    resized_height: int | None = None  # pixels, rounded to whole patches; both or neither
    resized_width: int | None = None
    min_pixels: int | None = None  # of an image, or of a frame, after resizing
    max_pixels: int | None = None
    total_pixels: int | None = None  # of all frames that are taken of a video
    nframes: int | None = None  # frames taken, rounded to whole patches
    fps: float | None = None  # frames taken from a second
    min_frames: int | None = None  # with `fps`
    max_frames: int | None = None
    video_start: float | None = None  # seconds from the beginning
    video_end: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                _check(field.name, value)
        if (self.resized_height is None) != (self.resized_width is None):
            raise ValueError("it has one of resized_height and resized_width; give both")
        sides = self.resized_height or 1, self.resized_width or 1
        if max(sides) > MAX_ASPECT_RATIO * min(sides):
            raise ValueError(
                f"its resized_height {sides[0]} and resized_width {sides[1]} are too long and thin"
            )
        for least, most in (("min_pixels", "max_pixels"), ("min_frames", "max_frames"),
                            ("video_start", "video_end")):
            one, other = getattr(self, least), getattr(self, most)
            if one is not None and other is not None and one > other:
                raise ValueError(f"its {least} {one} is above its {most} {other}")
        if self.nframes is not None and self.fps is not None:
            raise ValueError("it has both nframes and fps; give one")

    @property
    def asks_for_frames(self) -> bool:
        return any(getattr(self, name) is not None for name in FRAME_KEYS)

    @property
    def asks_for_pixels(self) -> bool:
        return any(getattr(self, name) is not None for name in (*PIXEL_KEYS, "total_pixels"))

    def to_dict(self) -> dict[str, int | float]:
        """What is asked for, by name; `MediaSettings(**...)` is the inverse."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in named if value is not None}

    def frames(
        self, num_frames: int, fps: float | None, limits: MediaLimits, factor: int
    ) -> tuple[int, int, int]:
        """First and last frame of the part that is asked for, and how many to take, evenly.

        The rules are qwen-vl-utils' `calculate_video_frame_range` and `smart_nframes`, with the
        run's `video_fps` and `video_maxlen` where it has numbers of its own. Of a part with fewer
        frames than a patch, which it refuses, all are taken.

        Args:
            num_frames, fps: the video's.
            factor: frames a patch.

        Raises:
            ValueError: the video has no such part, or fewer frames.
        """
        rate = fps or limits.video_fps
        first, last = 0, num_frames - 1
        seconds = num_frames / rate
        if self.video_start is not None:
            first = math.ceil(min(self.video_start, seconds) * rate)
        if self.video_end is not None:
            last = min(math.floor(min(self.video_end, seconds) * rate), last)
        if first > last or (first == last and num_frames > 1):
            raise ValueError(
                f"it asks for {self.video_start or 0:g} to {self.video_end or seconds:g} seconds "
                f"of a video of {seconds:g}, which is less than two frames"
            )
        total = last - first + 1
        if self.nframes is not None:
            count = round(self.nframes / factor) * factor
            if not factor <= count <= total:
                raise ValueError(
                    f"it asks for {self.nframes} frames of a video that has {total} there"
                )
            return first, last, count
        least = math.ceil((self.min_frames or MIN_FRAMES) / factor) * factor
        most = self.max_frames or min(limits.video_maxlen, total)
        most = math.floor(most / factor) * factor
        wanted = total / rate * (self.fps or limits.video_fps)
        count = math.floor(min(max(wanted, least), most, total) / factor) * factor
        if total < factor:
            return first, last, total
        if count == 0 and self.max_frames is None:  # the run's own bound, as the run takes it
            return first, last, min(total, limits.video_maxlen)
        if count == 0:
            raise ValueError(f"it asks for at most {self.max_frames} frames, less than a patch has")
        return first, last, count


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMedia:
    """One image or video of a prepared sample: its files in the shard, and its sizes.

    With the sizes here, rows are packed before a single media byte is read.
    """

    kind: str  # "image" or "video"
    files: tuple[str, ...]  # extensions of the sample's entries: "0.jpg", or a video's "1.0000.jpg"
    height: int  # pixels, upright
    width: int
    num_frames: int = 1
    fps: float | None = None  # frames a second of a video; None for images
    separate: bool = False  # a video whose frames are images, one a file
    settings: MediaSettings | None = None  # what its entry asks for it
    path: str | None = None  # as its entry names it; None: it names no file, or several

    @property
    def name(self) -> str:
        """What a prompt calls it that writes names."""
        return self.path or self.files[0]


def _check(name: str, value) -> None:
    seconds = name in ("fps", "video_start", "video_end")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"its {name} is no number")
    if not (name == "video_start" and value == 0) and not 0 < value <= sys.float_info.max:
        raise ValueError(f"its {name} is not above 0")
    if name == "fps" and value > MAX_FPS:
        raise ValueError(f"its fps is above {MAX_FPS:,}")
    if not seconds and (value != int(value) or value > _MOST):
        raise ValueError(f"its {name} is no whole number up to {_MOST}")
