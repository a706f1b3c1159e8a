"""Which weights beside an adapter are quantised, and where a layout changes their values; no torch.

Values are quantised in blocks of the weight as a rank holds it, flattened. Where a rank's blocks
are blocks of the published weights too, the values are the same in every layout, and those that
quantising the published weights gives.
"""

from __future__ import annotations

from megatron_vl.models.common.parts import part_of
from megatron_vl.ops.blockwise import BLOCK
from megatron_vl.parallel import LANGUAGE, Layout, Shard
from megatron_vl.weights.map import Weight, WeightMap, Where, listed
from megatron_vl.weights.rules import Rule


def is_layer_linear(weight: Weight) -> bool:
    """Whether a weight is a matrix of a language layer that is multiplied by, experts' included.

    The router, whose product decides which expert sees a token, is none.
    """
    return (part_of(weight.name) == LANGUAGE and weight.place.where is Where.LAYER
            and weight.rule.axis is not None and len(weight.rule.tail) == 1)


def keeps_blocks(rule: Rule, tp: int) -> bool:
    """Whether blocks of each of `tp` ranks' parts are blocks of the published tensors.

    Every run of values that is one on both sides must begin a block of both, and end one of both or
    both tensors.
    """
    whole = rule.published()
    for rank in range(tp):
        (rows, width), pieces = rule.pieces(tp, rank)
        for piece in pieces:
            (height, columns), (count, wide) = whole[piece.key], piece.shape
            if wide == columns == width:  # whole rows on both sides are one run
                count, wide = 1, count * wide
            start = piece.start[0] * columns + piece.start[1]
            at = piece.at[0] * width + piece.at[1]
            strides = () if count == 1 else (columns, width)  # from run to run
            ends = start + wide == height * columns and at + wide == rows * width
            if any(one % BLOCK for one in (start, at, *strides)) or (wide % BLOCK and not ends):
                return False
    return True


def cut_within_blocks(weights: WeightMap, layout: Layout) -> str:
    """The linear weights whose blocks are others than the published ones', in words; or nothing."""
    linear = [one for one in weights.weights if is_layer_linear(one)]
    cut = [one for one in linear if not keeps_blocks(one.rule, one.tp_of(layout, Shard())[0])]
    if not cut:
        return ""
    names = listed([".".join(one.name.split(".")[-2:]) for one in cut])
    count = sum(weights.layers[LANGUAGE] * len(one.each) for one in cut)
    return (
        f"{count} of {sum(weights.layers[LANGUAGE] * len(one.each) for one in linear)} quantised "
        f"weights ({names} of every layer) have rows on a rank of TP {layout.tp} that are no "
        f"multiple of {BLOCK} values long: their blocks, and so their values, are not those of the "
        f"whole weights"
    )
