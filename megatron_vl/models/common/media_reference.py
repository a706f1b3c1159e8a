"""transformers' Qwen2-VL and Qwen2.5-VL as judges."""

from __future__ import annotations

import math

import torch


def auto_class():
    """transformers' class that loads a published directory."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText


def inputs(spec, tokens, grids, patches, positions) -> dict:
    """What the model takes beside the tokens of one sample: images and videos apart.

    With our positions: its own differ after a video, from one of its major versions to the next.

    Args:
        tokens: int64 [S].
        grids: of the media, in order.
        patches: float [P, D] of them all; None without any.
        positions: int64 [3, S].
    """
    if patches is None:
        return {}
    kinds = {
        ("pixel_values", "image_grid_thw"): [], ("pixel_values_videos", "video_grid_thw"): [],
    }  # fmt: skip
    images, videos = kinds.values()
    for grid, pixels in zip(grids, patches.split([*map(math.prod, grids)]), strict=True):
        (videos if grid[0] > 1 else images).append((pixels, grid))
    is_image, is_video = tokens == spec.tokens.image, tokens == spec.tokens.video
    arguments = {
        "position_ids": positions[:, None],
        "mm_token_type_ids": (is_image.int() + 2 * is_video.int())[None],
    }
    for (values, grid_thw), found in kinds.items():
        if found:
            arguments[values] = torch.cat([pixels for pixels, _ in found])
            arguments[grid_thw] = torch.tensor([grid for _, grid in found])
    return arguments
