"""Qwen2-VL's vision tower: every layer attends within a frame."""

from __future__ import annotations

from megatron_vl.models.common.layer_spec import LayerKind
from megatron_vl.models.common.patch_tower import PatchTower, merger_config, tower_config
from megatron_vl.models.common.transformer_config import ModelOptions
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parallel import Layout, StageSplit


def build_tower(
    spec: ModelSpec, layout: Layout, split: StageSplit, options: ModelOptions, *, layers: range,
    **chunk,
) -> PatchTower:
    """One chunk's `layers` of the tower; `chunk` as `PatchTower` has it."""
    return PatchTower(
        spec.vision, tower_config(spec, layout, split, options),
        merger_config(spec, layout, options), kinds=[LayerKind(causal=False)] * len(layers),
        **chunk,
    )
