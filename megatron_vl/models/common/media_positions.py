"""Three-dimensional rotary positions (time, height, width) of one sample.

S tokens. Text advances all three axes together. An image or video starts at the position after the
text before it, counts its merged patches along each axis, and the text after it goes on from the
position after the largest of all three. The rule is Qwen2-VL's (arXiv:2409.12191, section 2.1), and
that of its training, of vLLM and of transformers 4; transformers 5 goes on from the position after
the longest spatial side, so that text may come before the last frames of a long video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch

from megatron_vl.models.family import Grid
from megatron_vl.models.spec import ModelSpec

VideoPositions = Literal["published", "transformers5"]  # whether frames count, or sides alone
_SMALL = 4096  # tokens of an image whose positions are remembered


def rope_index(
    tokens: torch.Tensor,
    grids: Sequence[Grid] = (),
    *,
    image_token: int,
    video_token: int,
    merge_size: int,
    video_positions: VideoPositions = "published",
    steps: Sequence[float] | None = None,
) -> torch.Tensor:
    """Position ids of one sample; with `transformers5` those of its `get_rope_index`.

    Args:
        tokens: int64 [S], each image or video already as many placeholders as it has merged
            patches.
        grids: one an image or video, in the order of their placeholders.
        merge_size: patches a side that become one token.
        steps: positions from a frame of each grid to the next, rounded down from the first one on;
            None: 1.

    Returns:
        int64 [3, S]: time, height and width, from 0.

    Raises:
        ValueError: the placeholders do not match the grids.
    """
    ids = tokens.numpy()
    length = ids.size
    positions = np.empty((3, length), dtype=np.int64)
    (media,) = ((ids == image_token) | (ids == video_token)).nonzero()
    seen = 0  # placeholders
    done = 0  # tokens
    here = 0  # the next text token's position
    for number, grid in enumerate(grids):
        if seen == media.size:
            raise ValueError("there are more grids than placeholders")
        start = int(media[seen])
        frames, rows, columns = int(grid[0]), int(grid[1]) // merge_size, int(grid[2]) // merge_size
        count = frames * rows * columns
        end = start + count
        if count == 0 or end > length or (ids[start:end] != ids[start]).any():
            raise ValueError(
                f"the grid {frames, int(grid[1]), int(grid[2])} needs {count} placeholders from "
                f"token {start} on"
            )
        positions[:, done:start] = np.arange(here, here + start - done)
        here += start - done
        counted = _remembered if count <= _SMALL else _counted
        here_on = positions[:, start:end]
        np.add(counted(frames, rows, columns), here, out=here_on)
        last = frames - 1  # its position in time
        if steps is not None and frames > 1:
            times = (np.arange(frames) * np.float32(steps[number])).astype(np.int64)
            here_on[0] = here + times.repeat(rows * columns)
            last = int(times[-1])
        here += max(rows, columns, last + 1 if video_positions == "published" else 0)
        done = end
        seen += count
    if seen < media.size:
        raise ValueError(f"there is no grid for the placeholders from token {media[seen]} on")
    positions[:, done:] = np.arange(here, here + length - done)
    return torch.from_numpy(positions)


def _counted(frames: int, rows: int, columns: int) -> np.ndarray:
    """Time, height and width of merged patches from 0, int64 [3, frames * rows * columns]."""
    return np.indices((frames, rows, columns)).reshape(3, -1)


_remembered = lru_cache(128)(_counted)


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaPositions:
    """`rope_index` of one model: a family's `megatron_vl.models.family.Positions`.

    Args:
        per_second: positions that a second of video takes; None: a frame of patches takes one.
        frames_apart: whether every frame of a video is a run of placeholders by itself.
    """

    axes: ClassVar[int] = 3  # time, height, width
    image_token: int
    video_token: int
    merge_size: int
    video_positions: VideoPositions
    per_second: float | None = None
    frames_apart: bool = False

    def __call__(
        self, tokens: torch.Tensor, grids: Sequence[Grid], seconds: Sequence[float] = ()
    ) -> torch.Tensor:
        steps = None if self.per_second is None else [self.per_second * one for one in seconds]
        if self.frames_apart:
            grids = [(1, rows, columns) for frames, rows, columns in grids for _ in range(frames)]
        return rope_index(
            tokens, grids, image_token=self.image_token, video_token=self.video_token,
            merge_size=self.merge_size, video_positions=self.video_positions, steps=steps,
        )


def media_positions(
    spec: ModelSpec, video_positions: VideoPositions, per_second: float | None = None
) -> MediaPositions:
    """Those of a model's samples."""
    return MediaPositions(
        image_token=spec.tokens.image, video_token=spec.tokens.video,
        merge_size=spec.vision.spatial_merge_size, video_positions=video_positions,
        per_second=per_second, frames_apart=spec.tokens.timestamp is not None,
    )
