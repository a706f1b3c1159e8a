"""Every weight of Qwen2-VL: those of its tower and of its decoder."""

from __future__ import annotations

from megatron_vl.models.common.decoder_rules import decoder_weights, whole_map
from megatron_vl.models.common.vision_rules import RENAMED, vision_weights
from megatron_vl.models.spec import ModelSpec
from megatron_vl.weights.map import WeightMap


def weight_map(spec: ModelSpec) -> WeightMap:
    """The map of a Qwen2-VL with these sizes."""
    decoder = decoder_weights(spec.decoder, hf="model", head="lm_head.weight")
    return whole_map(
        spec, "models/qwen2_vl/weight_map.py", vision_weights(spec.vision) + decoder,
        renamed=RENAMED,
    )
