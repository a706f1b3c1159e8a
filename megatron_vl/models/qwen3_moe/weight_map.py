"""Every weight of a Qwen3 with experts: those of its decoder."""

from __future__ import annotations

from megatron_vl.models.common.decoder_rules import decoder_weights, expert_stacks, whole_map
from megatron_vl.models.spec import ModelSpec
from megatron_vl.weights.map import WeightMap


def weight_map(spec: ModelSpec) -> WeightMap:
    """The map of a model with these sizes.

    Experts are published one by one; `save_pretrained(save_original_format=False)` stacks them.
    """
    return whole_map(
        spec, "models/qwen3_moe/weight_map.py",
        decoder_weights(spec.decoder, hf="model", head="lm_head.weight"),
        stacks=expert_stacks(spec.decoder, hf="model"),
    )
