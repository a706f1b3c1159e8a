"""Weights between formats and layouts, without Megatron-Core or a GPU and mostly without torch."""

from megatron_vl.weights.map import Place, Stored, Weight, WeightMap
from megatron_vl.weights.mcore_io import CheckpointInfo, inspect_checkpoint, load_rank
from megatron_vl.weights.plan import CopyPlan, make_plan
from megatron_vl.weights.reshard import run_plan

__all__ = [
    "CheckpointInfo",
    "CopyPlan",
    "Place",
    "Stored",
    "Weight",
    "WeightMap",
    "inspect_checkpoint",
    "load_rank",
    "make_plan",
    "run_plan",
]
