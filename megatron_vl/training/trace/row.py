"""Rows as the formulas of `training.activations` take them: full, trained throughout, all images.

Letters: b rows of s tokens.
"""

from __future__ import annotations

import math

import torch

from megatron_vl.data.encode.samples import RowBatch
from megatron_vl.models.registry import family
from megatron_vl.training.plan import Plan

SIDES = 8  # smallest images a side of an image: a row of the smallest alone has thousands


def full_batch(plan: Plan, pixels_on: torch.device | str | None) -> RowBatch:
    """A microbatch of `plan`.

    Every row is segments of two lengths that take turns, which attention copies into rectangles;
    the first has a short one too, for which the rows as they were are kept as well. With a vision
    tower, as many images of 64 tokens as fit into a row, or within max-patches-per-row, stand at
    its start.

    Args:
        pixels_on: the device of `pixel_patches`; None: a stage that has none of them.
    """
    spec, rows, length = plan.spec, plan.config.batch.micro_batch_size, plan.row_length
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    grids = torch.empty(0, 3, dtype=torch.int64)
    pixels = None
    if spec.vision is not None:
        grid, tokens_of_it = _image(plan)
        number = length // len(tokens_of_it)
        number = min(number, _most_patches(plan) // math.prod(grid))
        tokens[:, : number * len(tokens_of_it)] = tokens_of_it.repeat(number)
        grids = torch.tensor([grid] * (rows * number), dtype=torch.int64).reshape(-1, 3)
        if pixels_on is not None and number:
            patches = rows * number * math.prod(grid)
            pixels = torch.empty(
                patches, spec.vision.patch_dim, device=pixels_on,
                dtype=getattr(torch, plan.config.model.dtype),
            )
    axes = family(spec.model_type).positions(spec).axes
    bounds = sorted({row * length + of_64 * length // 64 for row in range(rows)
                     for of_64 in ((0, 18, 32, 50, 64) if row else (0, 18, 31, 49, 62, 64))})
    return RowBatch(
        tokens=tokens,
        labels=tokens,
        loss_mask=torch.ones(rows, length),
        position_ids=torch.arange(length).expand(axes, rows, length).contiguous(),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        pixel_patches=pixels,
        grid_thw=grids,
        sample_keys=[],
        sample_lengths=[length] * rows,
        row_tokens=[length] * rows,
    )


def _image(plan: Plan) -> tuple[tuple[int, int, int], torch.Tensor]:
    """A grid of patches, and the tokens that stand for it, int64 [n]."""
    vision, ids = plan.spec.vision, plan.spec.tokens
    frames, height, width = vision.smallest_grid
    grid = vision.only_grid or (frames, SIDES * height, SIDES * width)
    around = 2 * ids.spanned
    if (vision.num_tokens(grid) + around > plan.row_length
            or math.prod(grid) > _most_patches(plan)):
        grid = vision.smallest_grid
    places = torch.full((vision.num_tokens(grid) + around,), ids.image)
    if ids.spanned:
        places[0], places[-1] = ids.vision_start, ids.vision_end
    return grid, places


def _most_patches(plan: Plan) -> int:
    """Of a row: as max-patches-per-row says, else of one that is all images of the smallest."""
    return plan.config.data.max_patches_per_row or (
        plan.row_length * math.prod(plan.spec.vision.smallest_grid))
