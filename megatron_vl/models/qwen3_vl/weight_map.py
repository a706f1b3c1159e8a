"""Every weight of Qwen3-VL: those of its tower and of its decoder."""

from __future__ import annotations

from megatron_vl.models.common.decoder_rules import decoder_weights, whole_map
from megatron_vl.models.common.deepstack.rules import tower_weights
from megatron_vl.models.spec import ModelSpec
from megatron_vl.weights.map import WeightMap

LANGUAGE_MODEL = "model.language_model"


def weight_map(spec: ModelSpec) -> WeightMap:
    """The map of a Qwen3-VL with these sizes."""
    decoder = decoder_weights(spec.decoder, hf=LANGUAGE_MODEL, head="lm_head.weight")
    return whole_map(
        spec, "models/qwen3_vl/weight_map.py", tower_weights(spec.vision) + decoder,
        embedding=f"{LANGUAGE_MODEL}.embed_tokens.weight",
    )
