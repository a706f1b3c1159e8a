"""What a checkpoint of a run with an adapter holds: the factors, and what else is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)

from megatron_vl.parallel import StageSplit
from megatron_vl.peft.adapter_map import FACTORS, AdaptedWeight, AdapterMap
from megatron_vl.peft.lora import adapted
from megatron_vl.weights.rules import GateUp

LORA = ".lora."  # in the names of factors


def sharded_state(
    chunks: Sequence[torch.nn.Module], of: AdapterMap, split: StageSplit, *, metadata: dict,
    base: bool,
) -> list[dict]:
    """Of every chunk of this rank what is saved, or loaded, under its own names.

    Args:
        base: all weights of the model itself, not only those that are trained.
    """
    states = []
    for chunk in chunks:
        own = {key: one for key, one in chunk.sharded_state_dict(metadata=metadata).items()
               if LORA not in key}
        states.append(own if base else _trained(own))
    for one, number, name, module in adapted(chunks, of, split):
        for factor, leaf in FACTORS.items():
            states[number][f"{name}.{leaf}"] = _sharded(one, factor, leaf, module)
    return states


def _sharded(one: AdaptedWeight, factor: str, leaf: str, module: torch.nn.Module):
    """A factor of one layer; its key counts layers through the model: it fits every layout."""
    parameter, key = getattr(module.lora, factor.lower()), f"{one.module(local=False)}.{leaf}"
    cut = one.rule.axis
    if module.tp_group.size() == 1 or (factor == "B") != (cut == 0):
        sharded = make_sharded_tensor_for_checkpoint(parameter, key)  # alike on every TP rank
    else:
        sharded = make_tp_sharded_tensor_for_checkpoint(parameter, key, tp_axis=cut)
    if factor == "B" and isinstance(one.rule, GateUp):
        return apply_swiglu_sharded_factory(sharded, ())
    return sharded


def _trained(state: dict) -> dict:
    return {key: one for key, one in state.items()
            if not isinstance(one, ShardedObject) and one.data.requires_grad}
