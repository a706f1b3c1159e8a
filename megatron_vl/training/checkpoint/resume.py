"""A run goes on from a checkpoint: model, optimizer, schedule, random state, place in the data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, tensor_parallel

from megatron_vl.data.load.loader_state import from_json
from megatron_vl.errors import InputError, shown
from megatron_vl.inputs import read_text
from megatron_vl.peft.lora import factors
from megatron_vl.platform import barrier, select_platform, set_device_random_state
from megatron_vl.platform.checkpoints import names_in
from megatron_vl.training.adapter import stored_adapter
from megatron_vl.training.checkpoint.files import LOADER, faults, read_checksums
from megatron_vl.training.checkpoint.start import weights_alone
from megatron_vl.training.checkpoint.state import (
    OPTIMIZERS,
    hybrid_optimizers,
    inner_state,
    model_key,
    state_dict,
)
from megatron_vl.training.checkpoint.weights import Loaded, fill, load_weights
from megatron_vl.training.plan import Plan
from megatron_vl.weights.convert import inspect_weights
from megatron_vl.weights.found import LATEST
from megatron_vl.weights.mcore_io import CheckpointInfo
from megatron_vl.weights.torch_dist import check_data_only


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """Where training goes on."""

    iteration: int  # steps already done
    loader_states: tuple[Path, ...] = ()  # of every data-parallel rank; none: the data starts anew
    guard: dict = field(default_factory=dict)  # the state of the run's StepGuard
    samples: int | None = 0  # read so far; None where the checkpoint does not say
    weights: Loaded | None = None  # of a model, which it began with or goes on beside
    schedule: dict | None = None  # the state of its OptimizerParamScheduler; None: a new one begins


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
        weights = load_weights(info, model, plan.spec, plan.layout, plan.split)
        bad = {**weights.not_finite, **_begin_adapter(plan, model)}
        optimizer.reload_model_params()
        return Resumed(iteration=0, weights=replace(weights, not_finite=bad))
    weights = None
    if plan.trainable.adapter is not None and not plan.config.lora.save_base:
        _tell_other_base(info, options.load)
        weights = load_weights(
            inspect_weights(options.load), model, plan.spec, plan.layout, plan.split
        )
    check_data_only(info.path, torch.distributed.get_rank(), torch.distributed.get_world_size())
    barrier()  # no rank reads what another has refused
    with_optimizer = not options.no_load_optim
    if with_optimizer and not _holds(info, "optimizer"):
        raise InputError(
            f"{info.path} holds no optimizer state; give --no-load-optim to go on without it, or "
            f"--finetune to start at step 0."
        )
    state = state_dict(
        plan, info.iteration, model, optimizer if with_optimizer else None, scheduler, loading=True
    )
    same_ranks = info.layout is not None and (info.layout.tp, info.layout.pp) == (
        plan.layout.tp, plan.layout.pp)
    with_rng = not options.no_load_rng and same_ranks and _holds(info, "rng_state")
    if not with_rng:
        del state["rng_state"]
    if with_optimizer:
        # The groups are this run's own, whose rates may be others; see what is taken of the file's.
        for part in OPTIMIZERS:
            if part in state:
                del inner_state(state[part])["param_groups"]
    loaded = dist_checkpointing.load(state, str(info.path))
    for number, chunk in enumerate(model):
        # An adapter's checkpoint has its factors alone; what it was to have was asked for by name.
        # Of a chunk without factors there is nothing.
        chunk.module.load_state_dict(loaded.get(model_key(number, model), {}),
                                     strict=plan.trainable.adapter is None)
    if with_optimizer:
        _load_optimizer(optimizer, [loaded[part] for part in OPTIMIZERS if part in state])
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
        weights=weights, schedule=loaded["opt_param_scheduler"],
    )


def _tell_other_base(info: CheckpointInfo, load: str) -> None:
    """The weights beside an adapter may have moved; that they are others nobody can tell."""
    base = info.adapter["base"] if info.adapter else None
    if base not in (None, os.path.abspath(load)) and torch.distributed.get_rank() == 0:
        print(f"the adapter of {info.path} was trained beside {base} and goes on beside {load}",
              flush=True)


def _begin_adapter(plan: Plan, model) -> Mapping[str, int]:
    """The factors that a run begins with, where they are not new; returns how many numbers are NaN
    or Inf, as `Loaded` has it."""
    of = plan.trainable.adapter
    stored = None if of is None else stored_adapter(plan.config, of.weights)
    if stored is None:
        return {}
    held = list(factors([chunk.module for chunk in model], of, plan.split))
    return fill(held, stored.source, Path(plan.config.lora.adapter)).not_finite


def _load_optimizer(optimizer, loaded: list[dict]) -> None:
    """Moments and number of updates of a checkpoint, in this run's own parameter groups.

    Where its options may differ from the checkpoint's was checked with the plan.

    Args:
        loaded: of OPTIMIZERS, those that this rank has.
    """
    own = getattr(optimizer, "chained_optimizers", [optimizer])
    first = loaded[0]
    steps = [group["step"] for group in inner_state(first)["param_groups"] if "step" in group]
    common = {key: first[key] for key in ("param_state_sharding_type", "grad_scaler")
              if key in first}
    for one, part in zip(own, loaded, strict=True):
        mine = one.state_dict()
        part |= common
        inner = part if inner_state(mine) is mine else part.setdefault("optimizer", {})
        # A rank that trains nothing found nothing.
        inner.setdefault("state", {})
        if part is not inner:
            part.setdefault("fp32_from_fp16_params", [])
        inner["param_groups"] = inner_state(mine)["param_groups"]
        for group in inner["param_groups"]:
            group |= {"step": max(steps)} if steps else {}
    optimizer.load_state_dict(first if len(loaded) == 1 else loaded)


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


def _count_on(optimizer) -> None:
    """Let a loaded hybrid optimizer's GPU part count its steps itself.

    It has got the number; left in the groups of the whole, it would get it anew before each step.
    """
    for hybrid in hybrid_optimizers(optimizer):
        for group in hybrid.param_groups:
            group.pop("step", None)


def _holds(info: CheckpointInfo, key: str) -> bool:
    names = names_in(info.path)
    return any(name == key or name.startswith((f"{key}/", f"{key}.")) for name in names)


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
