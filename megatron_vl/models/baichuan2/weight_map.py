"""Every weight of Baichuan2-7B: Llama's, with q, k and v in one projection, W_pack."""

from __future__ import annotations

from megatron_vl.models.common.decoder_rules import decoder_weights, whole_map
from megatron_vl.models.spec import ModelSpec
from megatron_vl.weights.map import WeightMap


def weight_map(spec: ModelSpec) -> WeightMap:
    """The map of a Baichuan2 with these sizes. The head is stored raw."""
    return whole_map(
        spec, "models/baichuan2/weight_map.py",
        decoder_weights(spec.decoder, hf="model", head="lm_head.weight", packed="W_pack"),
    )
