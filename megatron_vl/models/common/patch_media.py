"""Media to grids and patches, bit for bit as transformers' PIL image processor makes them.

H rows, W columns, T frames, P patches, D = channels x temporal patch x patch x patch numbers a
patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_vl.errors import InputError, shown
from megatron_vl.models.common.patch_media_files import (
    VIDEO_SIZE,
    check_patches,
    image_settings,
    video_size,
)
from megatron_vl.models.family import COPY_AGAIN, Grid
from megatron_vl.models.media import (
    MIN_FRAMES,
    VIDEO,
    BadMedia,
    MediaLimits,
    MediaSettings,
    StoredMedia,
)
from megatron_vl.models.spec import ModelSpec
from megatron_vl.models.tower_spec import VisionSpec

_IMAGE_TOKENS = (4, 16384)  # least and most of what `resized_height` and `resized_width` ask for
_RESAMPLE = Image.Resampling.BICUBIC  # qwen-vl-utils'


def processor(hf_dir: Path, spec: ModelSpec, limits: MediaLimits | None = None) -> MediaProcessor:
    """The family's `megatron_vl.models.family.Processor`; see `MediaProcessor.from_hf_dir`."""
    return MediaProcessor.from_hf_dir(hf_dir, vision=spec.vision, limits=limits)


class MediaProcessor:
    """The media side of a Hugging Face directory: its preprocessor_config.json, made fast.

    transformers' own PIL image processor supplies the settings and is the reference. Between
    resizing and the flattened patches it rescales and normalises every pixel in floating point; a
    pixel has only 256 values, so one table a channel, computed once by the processor itself, gives
    the same bits. Video frames are resized by PIL as images are, each to the same size, and every
    `temporal_patch_size` of them share a patch (transformers' Qwen2VLVideoProcessor).
    """

    least_and_most = VIDEO_SIZE  # pixels of a frame, where the model's video settings name none
    edges_alone = False  # see `megatron_vl.models.common.patch_media_files.video_size`

    def __init__(self, processor, *, vision: VisionSpec, limits: MediaLimits | None = None,
                 video_size: tuple[int, int] | None = None):
        """`processor` is transformers' PIL image processor; `from_hf_dir` loads it.

        Args:
            video_size: least and most pixels that the model's video settings ask for; None: those
                of an image.
        """
        self.limits = limits or MediaLimits()
        self.patch_size = processor.patch_size
        self.merge_size = processor.merge_size
        self.temporal_patch_size = processor.temporal_patch_size
        image_size = processor.size["shortest_edge"], processor.size["longest_edge"]
        self.image_size = _chosen("image", self.limits, image_size)
        self.video_size = _chosen("video", self.limits, video_size or image_size)
        self.resizes = processor.do_resize
        self.resample = processor.resample if self.resizes else None
        self.in_channels, self.patch_dim = vision.in_channels, vision.patch_dim
        values = np.arange(256, dtype=np.uint8).reshape(1, 1, 256).repeat(self.in_channels, 0)
        if processor.do_rescale:
            values = processor.rescale(values, processor.rescale_factor)
        if processor.do_normalize:
            values = processor.normalize(values, processor.image_mean, processor.image_std)
        self._table = values.reshape(-1).astype(np.float32)  # [channels * 256]
        self._table_rows = (np.arange(self.in_channels, dtype=np.int16) * 256).reshape(1, -1, 1, 1)

    @classmethod
    def from_hf_dir(cls, hf_dir: Path, *, vision: VisionSpec,
                    limits: MediaLimits | None = None) -> MediaProcessor:
        """Read DIR/preprocessor_config.json, and video_preprocessor_config.json if it is there.

        Where transformers 5 saved the directory, processor_config.json holds both.

        Raises:
            InputError: a file is missing or unreadable, or differs from config.json.
        """
        from transformers import AutoImageProcessor

        path = image_settings(Path(hf_dir), vision)
        try:
            processor = AutoImageProcessor.from_pretrained(
                str(hf_dir), backend="pil", trust_remote_code=False, local_files_only=True
            )
            least, most = (processor.size[edge] for edge in ("shortest_edge", "longest_edge"))
        except Exception as error:  # transformers raises many kinds for a bad file
            words = str(error).strip().split("\n")[0].rstrip(".")
            raise InputError(f"{path} cannot be read ({shown(words)}); {COPY_AGAIN}.") from error
        check_patches(path, processor, vision)
        if not 0 < least <= most:
            raise InputError(
                f"{path} asks for images of {least} to {most} pixels; give a min_pixels above 0 "
                f"and no larger than max_pixels."
            )
        return cls(processor, vision=vision, limits=limits,
                   video_size=video_size(Path(hf_dir), cls.least_and_most,
                                         edges_alone=cls.edges_alone))

    # ---- sizes, without a pixel ---------------------------------------------------------------

    def shape(self, media: StoredMedia) -> Grid:
        """Frames, rows and columns of patches.

        Raises:
            BadMedia: one side is over 200 times the other; Qwen2-VL takes no such image. Or it has
                not what its entry asks for.
        """
        frames = len(self.frames(media))
        height, width = self._size(media, frames)
        rows, columns = height // self.patch_size, width // self.patch_size
        return -(-frames // self.temporal_patch_size), rows, columns

    def pixels(self, media: StoredMedia) -> tuple[int, int]:
        """See `megatron_vl.models.family.Processor`."""
        height, width = self._size(media, len(self.frames(media)))
        return width, height

    def num_tokens(self, grid: Grid) -> int:
        """Tokens the decoder sees of an image or video with this grid."""
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def seconds(self, media: StoredMedia) -> float:
        """Of a video, from one frame of its grid to the next; 0 of an image.

        By the rate at which frames are taken, as qwen-vl-utils and transformers' `sampled_fps`
        have it; where a video of frames does not say its own, they are taken at `video_fps`.
        """
        if media.kind != VIDEO:
            return 0.0
        asked, fps = media.settings, media.fps or self.limits.video_fps
        total = media.num_frames
        if asked is not None and asked.asks_for_frames:
            first, last, _ = asked.frames(
                media.num_frames, media.fps, self.limits, self.temporal_patch_size
            )
            total = last - first + 1
        return self.temporal_patch_size * total / (len(self.frames(media)) * fps)

    def times(self, media: StoredMedia) -> tuple[float, ...]:
        """See `megatron_vl.models.family.Processor`."""
        return ()

    def frame_indices(self, num_frames: int, fps: float | None) -> list[int]:
        """Frames taken of a video, by their numbers: `video_fps` a second, evenly, an even count.

        The rule is that of transformers' `Qwen2VLVideoProcessor.sample_frames`; of a video with
        fewer frames than a patch, which it refuses, all are taken.
        """
        t = self.temporal_patch_size
        most = min(self.limits.video_maxlen, num_frames) // t * t
        wanted = num_frames / (fps or self.limits.video_fps) * self.limits.video_fps
        count = math.floor(min(max(wanted, MIN_FRAMES), most, num_frames) / t) * t
        if count == 0:
            return list(range(min(num_frames, self.limits.video_maxlen)))
        return torch.arange(0, num_frames, num_frames / count).int().tolist()[:count]

    def frames(self, media: StoredMedia) -> list[int]:
        """Frames taken: of a video as its entry asks, where it does, else as the run does.

        Raises:
            BadMedia: it has not the frames that its entry asks for.
        """
        if media.kind != VIDEO:
            return [0]
        asked = media.settings
        if asked is None or not asked.asks_for_frames:
            return self.frame_indices(media.num_frames, media.fps)
        try:
            first, last, count = asked.frames(
                media.num_frames, media.fps, self.limits, self.temporal_patch_size
            )
        except ValueError as error:
            raise BadMedia(str(error)) from error
        # As qwen-vl-utils takes them; transformers' own rule takes no part of a video.
        return torch.linspace(first, last, count).round().long().tolist()

    def _size(self, media: StoredMedia, frames: int) -> tuple[int, int]:
        """Height and width after resizing: as its entry asks, where it does."""
        is_video, asked = media.kind == VIDEO, media.settings
        size = self.video_size if is_video else self.image_size
        if asked is None or not asked.asks_for_pixels:
            return self._resized(media, frames, size)
        factor = self.patch_size * self.merge_size
        if asked.resized_height is not None:
            least, most = (tokens * factor**2 for tokens in _IMAGE_TOKENS)
            return smart_resize(asked.resized_height, asked.resized_width, factor, least, most)
        least, most = _pixels(
            asked, size, frames=frames if is_video else None, factor=self.temporal_patch_size
        )
        return smart_resize(media.height, media.width, factor, least, most)

    def _resized(
        self, media: StoredMedia, frames: int, size: tuple[int, int]
    ) -> tuple[int, int]:
        """Height and width as the model's settings have it: multiples of patch x merge, the area
        within the budget.

        Args:
            frames: taken of a video.
            size: least and most pixels of an image, or of a frame.
        """
        if self.resample is None:
            return media.height, media.width
        return smart_resize(media.height, media.width, self.patch_size * self.merge_size, *size)

    # ---- pixels -------------------------------------------------------------------------------

    def load(
        self, media: StoredMedia, frames: Iterable[Image.Image], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Patches of an image or video, float32 [P, D].

        Args:
            frames: those of `self.frames(media)`, decoded.
            out: where to write them.

        Raises:
            BadMedia: it is not of the size it was prepared with; and what `frames` raises.
        """
        height, width = self._size(media, len(self.frames(media)))
        resized = []
        for frame in frames:
            if frame.size != (media.width, media.height):
                raise BadMedia(
                    f"it is {frame.size[0]} x {frame.size[1]} pixels but was prepared as "
                    f"{media.width} x {media.height}"
                )
            # Settings that ask for no resizing do not ask it of a size that an entry asks for.
            if self.resample is not None or (width, height) != frame.size:
                frame = frame.resize((width, height), resample=self.resample or _RESAMPLE)
            resized.append(np.asarray(frame))
        return self._patches(resized, out)

    def _patches(
        self, frames_HWC: Sequence[np.ndarray], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Frames of one size to patches; the last is repeated where a patch needs more."""
        p, m, t, c = self.patch_size, self.merge_size, self.temporal_patch_size, self.in_channels
        height, width, _ = frames_HWC[0].shape
        rows, columns = height // p, width // p
        still = len(frames_HWC) == 1  # one image fills the time of its patches: table it once
        depth = 1 if still else t
        frames = [*frames_HWC, *[frames_HWC[-1]] * (-len(frames_HWC) % depth)]
        time = len(frames) // depth
        pixels = np.stack(frames) if len(frames) > 1 else frames[0][None]
        blocks = pixels.reshape(time, depth, rows // m, m, p, columns // m, m, p, c)
        # Order of patches: the m x m that merge to one token stand together, frame after frame.
        blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # [T, h, w, m, m, c, depth, p, p]
        count = time * rows * columns
        index = blocks.reshape(count, c, depth, p * p) + self._table_rows
        if out is None:
            out = torch.empty(count, self.patch_dim)
        values = out.numpy().reshape(count, c, t, p * p)  # a view
        # An image's one frame fills the time of its patches.
        values[...] = self._table.take(index)  # [P, c, depth, p * p]
        return out


def _pixels(
    asked: MediaSettings, size: tuple[int, int], *, frames: int | None, factor: int
) -> tuple[float, float]:
    """Least and most pixels, as qwen-vl-utils' `fetch_image` and `fetch_video` choose them.

    A limit of the run gives way to one that is asked for, where that refuses both.

    Args:
        size: the run's.
        frames: taken of a video; None: an image.
        factor: frames a patch.
    """
    least = size[0] if asked.min_pixels is None else asked.min_pixels
    most = size[1] if asked.max_pixels is None else asked.max_pixels
    if frames is not None:  # a frame is never larger than the run's, and shares the total
        share = math.inf if asked.total_pixels is None else asked.total_pixels / frames * factor
        most = min(most, max(min(size[1], share), int(least * 1.05)))
    return (min(least, most), most) if asked.min_pixels is None else (least, max(least, most))


@lru_cache(4096)
def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width in multiples of `factor`, as transformers' function of this name has them.

    Raises:
        BadMedia: one side is over 200 times the other.
    """
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as theirs

    try:
        return theirs.smart_resize(
            height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels
        )
    except (ValueError, ZeroDivisionError) as error:
        raise BadMedia(f"it is {width} x {height} pixels, too long and thin") from error


def _chosen(kind: str, limits: MediaLimits, default: tuple[int, int]) -> tuple[int, int]:
    """Least and most pixels of one kind: the model's, but where a limit is given."""
    least, most = (getattr(limits, f"{kind}_{end}_pixels") for end in ("min", "max"))
    chosen = default[0] if least is None else least, default[1] if most is None else most
    if chosen[0] > chosen[1]:
        raise InputError(
            f"{kind}s would have {chosen[0]} to {chosen[1]} pixels, with the model's own limits "
            f"{default[0]} to {default[1]}; give both {kind}-min-pixels and {kind}-max-pixels."
        )
    return chosen
