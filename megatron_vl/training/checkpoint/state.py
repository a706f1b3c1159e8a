"""Checkpoints of a run: torch_dist out and in; weights alone are taken by `weights`.

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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_vl.data.load.loader_state import from_json, to_json
from megatron_vl.errors import InputError, shown
from megatron_vl.inputs import read_text
from megatron_vl.platform import (
    barrier,
    current_device,
    device_random_state,
    select_platform,
    set_device_random_state,
)
from megatron_vl.training.checkpoint.files import faults, read_checksums
from megatron_vl.training.checkpoint.saver import Saved, Saver
from megatron_vl.training.checkpoint.start import weights_alone
from megatron_vl.training.checkpoint.weights import Loaded, load_weights
from megatron_vl.training.plan import Plan
from megatron_vl.weights.found import LATEST
from megatron_vl.weights.hf_io import copy_side_files
from megatron_vl.weights.mcore_io import CheckpointInfo
from megatron_vl.weights.torch_dist import check_data_only

LOADER = "loader_dp{}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """Where training goes on."""

    iteration: int  # steps already done
    loader_states: tuple[Path, ...] = ()  # of every data-parallel rank; none: the data starts anew
    guard: dict = field(default_factory=dict)  # the state of the run's StepGuard
    samples: int | None = 0  # read so far; None where the checkpoint does not say
    weights: Loaded | None = None  # where nothing but weights was taken
    schedule: dict | None = None  # the state of its OptimizerParamScheduler; None: a new one begins


# ---- save -------------------------------------------------------------------------------------


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
        lambda: _state_dict(
            plan, iteration, model, optimizer, scheduler, loading=False, guard=guard,
            samples=samples,
        ),
        content=_storable(_metadata()), begin=begin, extra=extra,
    )


# ---- load -------------------------------------------------------------------------------------


def check_files(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files by their checksums; empty if nothing is.

    All ranks call it together; each reads a part of the files.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[str] = []
    try:
        sums = read_checksums(checkpoint)
        if sums is not None:
            found = faults(checkpoint, sums, sorted(sums)[rank::world])
    except (OSError, ValueError) as error:
        found = [str(error)]
    everyone: list = [None] * world
    torch.distributed.all_gather_object(everyone, found)
    return ", ".join(dict.fromkeys(fault for one in everyone for fault in one))


def load_checkpoint(
    plan: Plan, info: CheckpointInfo, own: bool, model, optimizer, scheduler
) -> Resumed:
    """Fill model, optimizer, schedule and random state from `info`.

    Weights alone are taken, into any layout, of what was converted and with `finetune`.
    """
    options = plan.config.checkpoint
    if weights_alone(plan.config, info, own):
        loaded = load_weights(info, model, plan.spec, plan.layout, plan.split)
        optimizer.reload_model_params()
        return Resumed(iteration=0, weights=loaded)
    check_data_only(info.path, torch.distributed.get_rank(), torch.distributed.get_world_size())
    barrier()  # no rank reads what another has refused
    with_optimizer = not options.no_load_optim
    if with_optimizer and not _holds(info, "optimizer"):
        raise InputError(
            f"{info.path} holds no optimizer state; give --no-load-optim to go on without it, or "
            f"--finetune to start at step 0."
        )
    state = _state_dict(
        plan, info.iteration, model, optimizer if with_optimizer else None, scheduler, loading=True
    )
    same_ranks = info.layout is not None and (info.layout.tp, info.layout.pp) == (
        plan.layout.tp, plan.layout.pp)
    with_rng = not options.no_load_rng and same_ranks and _holds(info, "rng_state")
    if not with_rng:
        del state["rng_state"]
    if with_optimizer:
        # The groups are this run's own, whose rates may be others; see what is taken of the file's.
        del _inner_state(state["optimizer"])["param_groups"]
    loaded = dist_checkpointing.load(state, str(info.path))
    for number, chunk in enumerate(model):
        chunk.module.load_state_dict(loaded[_model_key(number, model)], strict=True)
    if with_optimizer:
        _load_optimizer(optimizer, loaded["optimizer"])
        _count_on(optimizer)
    else:
        optimizer.reload_model_params()
    scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if with_rng:
        _set_random_state(loaded["rng_state"], info)
    return Resumed(
        iteration=info.iteration, loader_states=tuple(_loader_states(info)) if own else (),
        guard=loaded.get("megatron_vl", {}).get("guard", {}),
        samples=loaded.get("megatron_vl", {}).get("samples"),
        schedule=loaded["opt_param_scheduler"],
    )


def _load_optimizer(optimizer, loaded: dict) -> None:
    """Moments and number of updates of a checkpoint, in this run's own parameter groups.

    Where its options may differ from the checkpoint's was checked with the plan.
    """
    inner = _inner_state(loaded)
    # A rank that trains nothing found nothing.
    inner.setdefault("state", {})
    if loaded is not inner:
        loaded.setdefault("fp32_from_fp16_params", [])
    steps = [group["step"] for group in inner["param_groups"] if "step" in group]
    inner["param_groups"] = _inner_state(optimizer.state_dict())["param_groups"]
    for group in inner["param_groups"]:
        group |= {"step": max(steps)} if steps else {}
    optimizer.load_state_dict(loaded)


def _inner_state(optimizer_state: dict) -> dict:
    """The part of it that is torch's: all of it where Megatron-Core adds nothing."""
    return optimizer_state.get("optimizer", optimizer_state)


def _drop_empty(optimizer_state: dict) -> None:
    """Leave out what holds no tensor on this rank: Megatron-Core takes it for no state of a rank,
    and warns where the ranks differ in it."""
    for part, name in ((_inner_state(optimizer_state), "state"),
                       (optimizer_state, "fp32_from_fp16_params"),
                       (optimizer_state, "param_state")):
        held = part.get(name) or ()
        if not any(held.values() if isinstance(held, dict) else held):
            part.pop(name, None)


def _count_updates(optimizer_state: dict) -> None:
    """The number of updates in every parameter group that is to be saved.

    Groups without a parameter on this rank do not count theirs, and rank 0's are those saved.
    """
    groups = _inner_state(optimizer_state)["param_groups"]
    done = max((group.get("step", 0) for group in groups), default=0)
    box = torch.tensor([int(done)], device=current_device())
    torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
    for group in groups:
        group["step"] = int(box)


def _loader_states(info: CheckpointInfo) -> list[Path]:
    """Where every data-parallel rank stood in its data, in the order of the ranks.

    Raises:
        InputError: a rank's is missing.
    """
    found = sorted(info.path.glob(LOADER.format("[0-9]" * 5)))
    wanted = [info.path / LOADER.format(f"{rank:05d}") for rank in range(len(found))]
    if found != wanted:
        missing = next(path for path in wanted if path not in found)
        raise InputError(
            f"{missing} is missing, where a rank's place in the data is; restore it, or go on in a "
            f"new --save with --load {info.root}, where the data starts anew."
        )
    return found


def read_loader_state(path: Path) -> dict:
    """For `RowLoader.restore_state`.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return from_json(read_text(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}, where a rank stood in its data, cannot be read ({shown(error)}); "
            f"restore it, or go on from an earlier iteration by writing its number into "
            f"{path.parent.parent / LATEST}."
        ) from error


# ---- the parts --------------------------------------------------------------------------------


def _state_dict(
    plan: Plan, iteration: int, model, optimizer, scheduler, *, loading: bool,
    guard: dict | None = None, samples: int | None = None,
) -> dict:
    metadata = _metadata()
    state = {
        _model_key(number, model): chunk.module.sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(model)
    }
    models = dict(state)
    options = plan.config.checkpoint
    if optimizer is not None and (loading or not options.no_save_optim):
        state["optimizer"] = optimizer.sharded_state_dict(
            models if len(model) > 1 else models["model"], is_loading=loading, metadata=metadata
        )
        _drop_empty(state["optimizer"])
        if not loading:
            _count_updates(state["optimizer"])
        _drop_classes(optimizer, state["optimizer"])
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
                "layout": {"tp": plan.layout.tp, "pp": plan.layout.pp, "vp": plan.layout.vp},
                "split": plan.split.to_dict(),
                "dtype": plan.config.model.dtype,
                "optimizer": not options.no_save_optim,
                "guard": guard,
                "samples": samples,
            },
        }
    return state


def _hybrid(optimizer) -> list[HybridDeviceOptimizer]:
    inner = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [one for one in inner if isinstance(one, HybridDeviceOptimizer)]


def _drop_classes(optimizer, state: dict) -> None:
    """Parameter groups without the optimizers' classes, which no checkpoint may hold to be read."""
    if _hybrid(optimizer):
        for group in state["optimizer"]["param_groups"]:
            for name in [name for name, value in group.items() if isinstance(value, type)]:
                del group[name]


def _count_on(optimizer) -> None:
    """Let a loaded hybrid optimizer's GPU part count its steps itself.

    It has got the number; left in the groups of the whole, it would get it anew before each step.
    """
    for hybrid in _hybrid(optimizer):
        for group in hybrid.param_groups:
            group.pop("step", None)


def _metadata() -> dict:
    return {
        # Optimizer state in the model's own shapes: TP, PP and DP may all change on resume.
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gathered over gloo onto one data-parallel rank, not onto all of them.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _storable(metadata: dict) -> dict:
    return {key: value for key, value in metadata.items() if key != "dp_cp_group"}


def _model_key(number: int, model) -> str:
    return f"model{number}" if len(model) > 1 else "model"


def _loader_file() -> str:
    return LOADER.format(f"{parallel_state.get_data_parallel_rank():05d}")


def _holds(info: CheckpointInfo, key: str) -> bool:
    names = load_sharded_metadata(str(info.path))
    return any(name == key or name.startswith((f"{key}/", f"{key}.")) for name in names)


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


def _set_random_state(state: dict, info: CheckpointInfo) -> None:
    here = select_platform().name
    if state["platform"] != here:
        if torch.distributed.get_rank() == 0:
            print(f"random states of {info.path} are those of {state['platform']} and start anew "
                  f"on {here}", flush=True)
        return
    torch.set_rng_state(state["cpu"])
    set_device_random_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
