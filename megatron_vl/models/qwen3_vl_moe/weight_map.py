"""Every weight of a Qwen3-VL with experts: those of its tower and of its decoder."""

from __future__ import annotations

from megatron_vl.models.common.decoder_rules import decoder_weights, expert_stacks, whole_map
from megatron_vl.models.common.deepstack.rules import tower_weights
from megatron_vl.models.spec import ModelSpec
from megatron_vl.weights.map import WeightMap

LANGUAGE_MODEL = "model.language_model"


def weight_map(spec: ModelSpec) -> WeightMap:
    """The map of a model with these sizes; its experts are published as two tensors a layer."""
    decoder = decoder_weights(spec.decoder, hf=LANGUAGE_MODEL, head="lm_head.weight")
    return whole_map(
        spec, "models/qwen3_vl_moe/weight_map.py", tower_weights(spec.vision) + decoder,
        embedding=f"{LANGUAGE_MODEL}.embed_tokens.weight",
        stacks=expert_stacks(spec.decoder, hf=LANGUAGE_MODEL), stacked=True,
    )
