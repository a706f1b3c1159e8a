"""What is in a checkpoint of a run, a torch_dist one, and saving it; `resume` goes on from it.

SAVE/
    config.json, tokenizer files         the model's own, so that SAVE converts to HF by itself
    latest_checkpointed_iteration.txt    the iteration to resume from
    iter_0000100/                        a torch_dist checkpoint; reshards when TP, PP or DP change
        loader_dp00000.json              where each data-parallel rank stood in its data
        SHA256SUMS                       of all its files

`saver` writes it, under a hidden name until every rank has finished.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_vl.data.load.loader_state import to_json
from megatron_vl.models.common.parts import PARTS
from megatron_vl.peft.checkpoint import sharded_state
from megatron_vl.platform import current_device, device_random_state, select_platform
from megatron_vl.platform.checkpoints import whole_buckets
from megatron_vl.training.checkpoint.files import LOADER
from megatron_vl.training.checkpoint.saver import Saved, Saver
from megatron_vl.training.plan import Plan
from megatron_vl.weights.hf_io import copy_side_files

# Megatron-Core updates what is divided over experts' ranks by an optimizer of its own. How far both
# are, the first one's says, which every rank and every layout has.
OPTIMIZERS = ("optimizer", "optimizer_of_experts")


def save_checkpoint(
    saver: Saver, plan: Plan, iteration: int, model, optimizer, scheduler, *, loader_state,
    guard: dict, samples: int | None,
) -> list[Saved]:
    """Save, or begin to, SAVE/iter_XXXXXXX; returns the saves that ended. All ranks call it.

    Args:
        loader_state: what the loader's `save_state_rank` returned on the rank of a replica that
            reads, None on the others.
        guard: the state of the run's `StepGuard`.
        samples: read so far, where that is known.
    """

    def begin(_folder: Path) -> None:
        if plan.hf_dir.resolve() != saver.root.resolve():  # a resumed run may have no other source
            copy_side_files(plan.hf_dir, saver.root)

    def extra(folder: Path) -> list[str]:
        if loader_state is None:
            return []
        with (folder / _loader_file()).open("w", encoding="utf-8") as file:
            file.write(to_json(loader_state))
            file.flush()
            os.fsync(file.fileno())
        return [_loader_file()]

    return saver.save(
        iteration,
        lambda: state_dict(
            plan, iteration, model, optimizer, scheduler, loading=False, guard=guard,
            samples=samples,
        ),
        content=_storable(_metadata()), begin=begin, extra=extra,
    )


def state_dict(
    plan: Plan, iteration: int, model, optimizer, scheduler, *, loading: bool,
    guard: dict | None = None, samples: int | None = None,
) -> dict:
    """What is saved; with `loading` the places that a checkpoint's tensors are read into."""
    metadata = _metadata()
    state = {model_key(number, model): chunk
             for number, chunk in enumerate(_weights(plan, model, metadata))}
    models = dict(state)
    options = plan.config.checkpoint
    if optimizer is not None and (loading or not options.no_save_optim):
        with whole_buckets(optimizer):
            whole = optimizer.sharded_state_dict(
                models if len(model) > 1 else models["model"], is_loading=loading,
                metadata=metadata,
            )
        parts = {key: whole[number] for number, key in enumerate(OPTIMIZERS) if number in whole}
        parts = parts or {OPTIMIZERS[0]: whole}
        for part in parts.values():
            _drop_empty(part)
        if not loading:
            _count_updates(parts.values())
        _drop_classes(optimizer, parts.values())
        state |= parts
    state["opt_param_scheduler"] = scheduler.state_dict()
    if loading or not options.no_save_rng:
        state["rng_state"] = _random_state()
    if not loading:
        state |= {
            "args": plan.config.resolved(),
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "megatron_vl": {
                "model_type": plan.spec.model_type,
                "layout": plan.layout.cut,
                "split": plan.split.to_dict(),
                "dtype": plan.config.model.dtype,
                "optimizer": not options.no_save_optim,
                "guard": guard,
                "samples": samples,
                **_adapter(plan),
            },
        }
    return state


def _weights(plan: Plan, model, metadata: dict) -> list[dict]:
    """Of every chunk what is saved; beside an adapter the model's weights need not be."""
    chunks = [chunk.module for chunk in model]
    adapter = plan.trainable.adapter
    if adapter is None:
        return [chunk.sharded_state_dict(metadata=metadata) for chunk in chunks]
    return sharded_state(chunks, adapter, plan.split, metadata=metadata,
                         base=plan.config.lora.save_base)


def _adapter(plan: Plan) -> dict:
    """What the checkpoint says of an adapter: which it is, and what it is beside."""
    of, options = plan.trainable.adapter, plan.config
    if of is None:
        return {}
    return {"adapter": of.adapter.to_dict() | {
        "base": os.path.abspath(options.checkpoint.load), "saved_base": options.lora.save_base,
        "trained": [part for part in PARTS if part not in plan.trainable.frozen],
    }}


def inner_state(optimizer_state: dict) -> dict:
    """What of an optimizer's state is torch's: all of it where Megatron-Core adds nothing."""
    return optimizer_state.get("optimizer", optimizer_state)


def _drop_empty(optimizer_state: dict) -> None:
    """Leave out what holds no tensor on this rank: Megatron-Core takes it for no state of a rank,
    and warns where the ranks differ in it."""
    for part, name in ((inner_state(optimizer_state), "state"),
                       (optimizer_state, "fp32_from_fp16_params"),
                       (optimizer_state, "param_state")):
        held = part.get(name) or ()
        if not any(held.values() if isinstance(held, dict) else held):
            part.pop(name, None)


def _count_updates(parts: Iterable[dict]) -> None:
    """The number of updates in every parameter group that is to be saved.

    Groups without a parameter on this rank do not count theirs, and rank 0's are those saved.
    """
    groups = [group for part in parts for group in inner_state(part)["param_groups"]]
    done = max((group.get("step", 0) for group in groups), default=0)
    box = torch.tensor([int(done)], device=current_device())
    torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
    for group in groups:
        group["step"] = int(box)


def hybrid_optimizers(optimizer) -> list[HybridDeviceOptimizer]:
    """Those within `optimizer` that are Megatron-Core's over host and device."""
    inner = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [one for one in inner if isinstance(one, HybridDeviceOptimizer)]


def _drop_classes(optimizer, parts: Iterable[dict]) -> None:
    """Parameter groups without the optimizers' classes, which no checkpoint may hold to be read."""
    for part in parts if hybrid_optimizers(optimizer) else ():
        for group in inner_state(part)["param_groups"]:
            for name in [name for name, value in group.items() if isinstance(value, type)]:
                del group[name]


def _metadata() -> dict:
    return {
        # Optimizer state in the model's own shapes: TP, PP and DP may all change on resume.
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gathered over gloo onto one data-parallel rank, not onto all of them.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        # Moments under the names of their weights, whichever optimizer has these.
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _storable(metadata: dict) -> dict:
    return {key: value for key, value in metadata.items() if key != "dp_cp_group"}


def model_key(number: int, model) -> str:
    """The name of chunk `number` of this rank's `model` in a checkpoint."""
    return f"model{number}" if len(model) > 1 else "model"


def _loader_file() -> str:
    return LOADER.format(f"{parallel_state.get_data_parallel_rank():05d}")


def _random_state() -> ShardedObject:
    """torch's generators and Megatron-Core's tracker; data order is the loader's own state."""
    state = {
        "platform": select_platform().name,
        "cpu": torch.get_rng_state(),
        "device": device_random_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    pp, tp = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", state, shape, (pp, tp), replica_id=replica)
