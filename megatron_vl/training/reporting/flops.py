"""What a step had to compute: FLOPs of the vision part and of the language model.

Of every matrix product with a weight: one forward, one more for the gradient of its input where
anything before it is trained, one more for the weight's own where that is trained. Attention has no
weights: one forward, two backward where a gradient reaches it. So three times the forward pass when
all is trained. That a first layer's input needs no gradient is not taken off, as nobody's figures
do, and what recomputation computes again is not needed and not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_vl.models.common.parts import PARTS
from megatron_vl.models.family import Grid
from megatron_vl.models.spec import ModelSpec


def step_flops(
    spec: ModelSpec, *, grids: Iterable[Grid], lengths: Sequence[int], trained: int,
    frozen: Sequence[str] = (),
) -> tuple[int, int]:
    """(vision tower and merger, language model): forward and backward of one optimizer step.

    Args:
        grids: patches of every image and video.
        lengths: tokens of every sample.
        trained: positions with a loss.
        frozen: keys of PARTS that are not trained.
    """
    vit, merger, llm = (part not in frozen for part in PARTS)
    vision = 0
    for grid in grids:
        of_merger = spec.vision.merger_flops(grid)
        tower = spec.vision.forward_flops(grid) - of_merger
        vision += tower * (3 if vit else 1) + of_merger * (1 + (vit or merger) + merger)
    attention = spec.decoder.attention_flops(lengths)
    matrices = spec.decoder.forward_flops(lengths, trained) - attention
    reached = vit or merger or llm
    language = matrices * (1 + reached + llm) + attention * (3 if reached else 1)
    return vision, language


def utilization(flops: float, *, seconds: float, ranks: int, peak: float | None) -> float | None:
    """The part of `ranks` devices' `peak` FLOPs a second that was used; None without a peak."""
    return None if peak is None else flops / (seconds * ranks * peak)
