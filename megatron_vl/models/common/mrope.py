"""Three-dimensional rotary positions (time, height, width) of one sample.

S tokens. Text advances all three axes together. An image or video starts at the position after the
text before it, counts its merged patches along each axis, and the text after it goes on from the
position after its longest spatial side. The rule is Qwen2-VL's (arXiv:2409.12191, section 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Grid = Sequence[int]  # (frames, rows, columns) in patches before merging, as image processors say


def rope_index(
    tokens: torch.Tensor,
    *,
    image_token: int,
    video_token: int,
    merge_size: int,
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
) -> torch.Tensor:
    """Position ids of one sample, equal to transformers' `Qwen2VLModel.get_rope_index`.

    Args:
        tokens: int64 [S], each image or video already as many placeholders as it has merged
            patches.
        merge_size: patches a side that become one token.
        image_grids: one grid an image, in the order of their placeholders; videos alike.

    Returns:
        int64 [3, S]: time, height and width, from 0.

    Raises:
        ValueError: the placeholders do not match the grids.
    """
    ids = tokens.numpy()
    length = ids.size
    positions = np.empty((3, length), dtype=np.int64)
    grids = {image_token: iter(image_grids), video_token: iter(video_grids)}
    media = np.flatnonzero((ids == image_token) | (ids == video_token))
    seen = 0  # placeholders
    done = 0  # tokens
    here = 0  # the next text token's position
    while seen < media.size:
        start = int(media[seen])
        token = int(ids[start])
        grid = next(grids[token], None)
        if grid is None:
            raise ValueError(f"there is no grid for the placeholders from token {start} on")
        frames, rows, columns = int(grid[0]), int(grid[1]) // merge_size, int(grid[2]) // merge_size
        count = frames * rows * columns
        end = start + count
        if count == 0 or end > length or (ids[start:end] != token).any():
            raise ValueError(
                f"the grid {frames, int(grid[1]), int(grid[2])} needs {count} placeholders from "
                f"token {start} on"
            )
        positions[:, done:start] = np.arange(here, here + start - done)
        here += start - done
        block = positions[:, start:end].reshape(3, frames, rows, columns)
        block[0] = np.arange(here, here + frames)[:, None, None]
        block[1] = np.arange(here, here + rows)[:, None]
        block[2] = np.arange(here, here + columns)
        positions[:, start:end] = block.reshape(3, count)
        here += max(rows, columns)
        done = end
        seen += count
    positions[:, done:] = np.arange(here, here + length - done)
    for kind, left in (("image", grids[image_token]), ("video", grids[video_token])):
        if next(left, None) is not None:
            raise ValueError(f"there are more {kind} grids than {kind} placeholders")
    return torch.from_numpy(positions)
