"""transformers' Qwen2-VL and those after it as judges."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from megatron_vl.models.family import Asked


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
    is_image, is_video = tokens == spec.tokens.image, tokens == spec.tokens.video
    shown, at = is_video[is_image | is_video].tolist(), 0  # of each place, whether it is a video's
    for grid, pixels in zip(grids, patches.split([*map(math.prod, grids)]), strict=True):
        (videos if shown[at] else images).append((pixels, grid))
        at += spec.vision.num_tokens(grid)
    arguments = {
        "position_ids": positions[:, None],
        "mm_token_type_ids": (is_image.int() + 2 * is_video.int())[None],
    }
    for (values, grid_thw), found in kinds.items():
        if found:
            arguments[values] = torch.cat([pixels for pixels, _ in found])
            arguments[grid_thw] = torch.tensor([grid for _, grid in found])
    return arguments


def generator_inputs(model, spec, samples: Sequence[Asked], ids: torch.Tensor) -> dict:
    """What `generate` takes beside the tokens of several samples, int64 [B, S], padded on the left.

    Positions are ours, as in `inputs`; transformers counts on from a sample's last.
    """
    made = [inputs(spec, one.tokens, one.grids, one.patches, one.positions) for one in samples]
    if not any(made):
        return {}
    padded = [F.pad(one.positions, (ids.shape[1] - one.positions.shape[1], 0)) for one in samples]
    media = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    return {"position_ids": torch.stack(padded, dim=1)} | {
        name: torch.cat([one[name] for one in made if name in one])
        for name in media if any(name in one for one in made)
    }
