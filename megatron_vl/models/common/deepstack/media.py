"""Qwen3-VL's media: Qwen2-VL's images; videos with a budget for all frames, and the time of each.

The rules are those of transformers' `Qwen3VLVideoProcessor` and `Qwen3VLProcessor`. Its
`cap_pixels_per_frame` is off, as where it is not set.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_vl.models.common.patch_media import MediaProcessor
from megatron_vl.models.media import MIN_FRAMES, VIDEO, BadMedia, MediaLimits, StoredMedia
from megatron_vl.models.spec import ModelSpec
from megatron_vl.models.tower_spec import VisionSpec

_FRAME_TOKENS = 128, 768  # qwen-vl-utils' VIDEO_MIN_TOKEN_NUM and VIDEO_MAX_TOKEN_NUM


def processor(
    hf_dir: Path, spec: ModelSpec, limits: MediaLimits | None = None
) -> TimedMediaProcessor:
    """The family's `megatron_vl.models.family.Processor`; see `MediaProcessor.from_hf_dir`."""
    return TimedMediaProcessor.from_hf_dir(hf_dir, vision=spec.vision, limits=limits)


class TimedMediaProcessor(MediaProcessor):
    """See `MediaProcessor`.

    A run's limits of videos are of each frame, as for every family; the model's own are of all.
    What an entry asks for its own is of each frame too, as qwen-vl-utils reads it.
    """

    least_and_most = 128 * 32 * 32, 768 * 32 * 32  # of a whole video
    edges_alone = True

    def __init__(self, processor, *, vision: VisionSpec, limits: MediaLimits | None = None,
                 video_size: tuple[int, int] | None = None):
        limits = limits or MediaLimits()
        token = (processor.patch_size * processor.merge_size) ** 2  # pixels
        least, most = (tokens * token for tokens in _FRAME_TOKENS)
        super().__init__(
            processor, vision=vision, limits=limits,
            video_size=(min(least, limits.video_max_pixels or least),
                        max(most, limits.video_min_pixels or most)),
        )
        self.whole_size = video_size or (
            processor.size["shortest_edge"], processor.size["longest_edge"]
        )

    def frame_indices(self, num_frames: int, fps: float | None) -> list[int]:
        """Frames taken of a video, by their numbers: `video_fps` a second, evenly, from the first
        to the last."""
        limits = self.limits
        wanted = int(num_frames / (fps or limits.video_fps) * limits.video_fps)
        count = min(max(wanted, MIN_FRAMES), limits.video_maxlen, num_frames)
        return np.linspace(0, num_frames - 1, count).round().astype(int).tolist()

    def times(self, media: StoredMedia) -> tuple[float, ...]:
        """See `megatron_vl.models.family.Processor`: of a patch, the middle of its frames' times.

        Frames that do not say their rate are taken for `video_fps` a second.
        """
        if media.kind != VIDEO:
            return ()
        fps = media.fps or self.limits.video_fps
        shown = [number / fps for number in self.frames(media)]
        of_patch = self.temporal_patch_size
        patches = [shown[at : at + of_patch] for at in range(0, len(shown), of_patch)]
        return tuple((patch[0] + patch[-1]) / 2 for patch in patches)

    def _resized(
        self, media: StoredMedia, frames: int, size: tuple[int, int]
    ) -> tuple[int, int]:
        if self.resample is None or media.kind != VIDEO:
            return super()._resized(media, frames, size)
        least, most = self.whole_size
        if self.limits.video_min_pixels is not None:
            least = self.limits.video_min_pixels * frames
            most = max(least, most)
        if self.limits.video_max_pixels is not None:
            most = self.limits.video_max_pixels * frames
            least = min(least, most)
        return _smart_resize(
            max(frames, self.temporal_patch_size), media.height, media.width,
            self.temporal_patch_size, self.patch_size * self.merge_size, least, most,
        )


@lru_cache(4096)
def _smart_resize(
    frames: int, height: int, width: int, temporal: int, factor: int, least: int, most: int
) -> tuple[int, int]:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    try:
        return smart_resize(
            frames, height, width, temporal_factor=temporal, factor=factor, min_pixels=least,
            max_pixels=most,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise BadMedia(f"it is {width} x {height} pixels, too long and thin") from error
