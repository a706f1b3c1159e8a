"""Qwen2.5-VL's vision tower: most layers attend within windows, a few within a frame.

A window is a square of cells, each of which the merger makes one token. Layers see the patches in
an order in which every window is a run; the merger's output goes back to the order of the tokens
(arXiv 2502.13923, section 2.1.1). Which layers attend within a frame is said by their numbers in
the whole tower, on whatever stage they are.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby

import torch

from megatron_vl.models.common.layer_spec import LayerKind
from megatron_vl.models.common.patch_tower import Order, PatchTower, merger_config, tower_config
from megatron_vl.models.common.transformer_config import ModelOptions
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parallel import Layout, StageSplit

Grid = tuple[int, int, int]


def build_tower(
    spec: ModelSpec, layout: Layout, split: StageSplit, options: ModelOptions, *, layers: range,
    **chunk,
) -> WindowTower:
    """One chunk's `layers` of the tower; `chunk` as `PatchTower` has it."""
    full = spec.vision.full_attention_layers
    return WindowTower(
        spec.vision, tower_config(spec, layout, split, options),
        merger_config(spec, layout, options),
        kinds=[LayerKind(causal=False, windowed=layer not in full) for layer in layers], **chunk,
    )


class WindowTower(PatchTower):
    def order(self, grids: list[Grid]) -> Order:
        """Window after window, row by row; within one, cell after cell, row by row."""
        merge, side = self.spec.spatial_merge_size, self.spec.window_cells
        cells, windows, start = [], [], 0
        for grid in grids:
            here, sizes = window_order(grid, merge, side)
            cells.append(here + start)
            windows += [size * merge**2 for size in sizes]
            start += len(here)
        order = torch.cat(cells)
        patches = order[:, None] * merge**2 + torch.arange(merge**2)
        return Order(patches=patches.flatten(), back=order.argsort(), windows=windows)


@lru_cache(maxsize=128)
def window_order(grid: Grid, merge: int, side: int) -> tuple[torch.Tensor, list[int]]:
    """The cells of one image or video, by windows of `side` x `side`; and how many each has.

    Windows at the right and at the bottom have what is left; frames share none.

    Returns:
        int64 [cells], and the windows' sizes in the same order.
    """
    t, h, w = grid[0], grid[1] // merge, grid[2] // merge
    rows, columns = h // side + bool(h % side), w // side + bool(w % side)
    frame, row, column = torch.meshgrid(
        torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij"
    )
    window = ((frame * rows + row // side) * columns + column // side).flatten()
    order = window.argsort(stable=True)  # cells come row by row already
    return order, [len(list(run)) for _, run in groupby(window[order].tolist())]
