"""What a step had to compute: FLOPs of the vision part and of the language model.

Of every matrix product with a weight: one forward, one more for the gradient of its input where
anything before it is trained, one more for the weight's own where that is trained. Attention has no
weights: one forward, two backward where a gradient reaches it. So three times the forward pass when
all is trained. That a first layer's input needs no gradient is not taken off, as nobody's figures
do, and what recomputation computes again is not needed and not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from megatron_vl.models.common.parts import MERGER, PARTS
from megatron_vl.models.family import Grid
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parallel import LANGUAGE, VISION
from megatron_vl.peft.trainable import Trainable

ALL = Trainable()


def step_flops(
    spec: ModelSpec, *, grids: Iterable[Grid], lengths: Sequence[int], trained: int,
    trainable: Trainable = ALL,
) -> tuple[int, int]:
    """(vision tower and merger, language model): forward and backward of one optimizer step.

    Args:
        grids: patches of every image and video.
        lengths: tokens of every sample.
        trained: positions with a loss.
        trainable: what is trained; each number of an adapter's factors is a product with a token,
            a patch or an image token, computed once and twice more for the gradients.
    """
    vit, merger, llm = (part not in trainable.frozen for part in PARTS)
    below, joined, _ = (part not in trainable.still for part in PARTS)  # reached by gradients
    added = {part: 3 * 2 * number for part, number in trainable.adapter_numbers.items()}
    vision = 0
    for grid in grids:
        of_merger = spec.vision.merger_flops(grid)
        tower = spec.vision.forward_flops(grid) - of_merger
        vision += tower * (1 + below + vit) + of_merger * (1 + (below or joined) + merger)
        vision += added.get(VISION, 0) * math.prod(grid)
        vision += added.get(MERGER, 0) * spec.vision.num_tokens(grid)
    attention = spec.decoder.attention_flops(lengths)
    matrices = spec.decoder.forward_flops(lengths, trained) - attention
    language = matrices * (2 + llm) + attention * 3 + added.get(LANGUAGE, 0) * sum(lengths)
    return vision, language


def utilization(flops: float, *, seconds: float, ranks: int, peak: float | None) -> float | None:
    """The part of `ranks` devices' `peak` FLOPs a second that was used; None without a peak."""
    return None if peak is None else flops / (seconds * ranks * peak)
