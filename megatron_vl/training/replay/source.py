"""What is replayed: a run's checkpoint, its options and its ranks; imports no Megatron-Core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_vl.errors import InputError
from megatron_vl.parallel import Layout
from megatron_vl.training.checkpoint.files import LOADER, folder
from megatron_vl.training.options.checkpoint import CheckpointOptions
from megatron_vl.training.options.config import LENGTHS, TrainConfig
from megatron_vl.training.options.log import LogOptions
from megatron_vl.training.paths import check_paths
from megatron_vl.training.plan import Plan, plan_run
from megatron_vl.training.reporting.history import METRICS, History, read_history
from megatron_vl.weights.found import iterations
from megatron_vl.weights.mcore_io import CheckpointInfo, inspect_checkpoint

_STAGES = ("pp_layers", "vit_pp_layers", "decoder_first_pipeline_num_layers")
# What only a run that goes on, or is kept, has.
_LEFT_OUT = {
    *LENGTHS, "exit_interval", "exit_duration_in_mins", "early_stop",
    *(f.name for group in (CheckpointOptions, LogOptions) for f in fields(group)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """A step of a run, and how it is run again."""

    run: Path
    step: int
    checkpoint: CheckpointInfo  # the last before it
    plan: Plan
    layout: Layout  # the run's own
    recorded: Mapping[str, Any] | None  # what the run's metrics say of the step
    replica: int | None  # of the run: the one whose rows are reported; None: all
    note: str = ""  # what else makes its steps others than the run's

    @property
    def sources(self) -> int:
        """Data-parallel ranks of the run whose rows one of the replay reads."""
        return self.layout.dp // self.plan.layout.dp


def find_replay(
    run: Path, step: int, given: Mapping[str, Any], *, dp: int | None, rank: int | None,
    on_cpu: bool,
) -> Replay:
    """Look for all that the replay of a step needs.

    Args:
        given: options instead of the run's own: of the layout, and paths that moved.
        dp: data-parallel size; None: the run's.
        rank: of the run, whose replica's rows are reported; None: all.
        on_cpu: whether kernels that the run chose for its device have to be left out.

    Raises:
        InputError: the step cannot be had, or not so.
    """
    info = _checkpoint(run, step)
    history = _history(run, info)
    # Options may have changed when the run went on from this very checkpoint.
    start = next((one for one in reversed(history.starts if history else ())
                  if one.get("done", step) < step), {})
    begun_here = start.get("done", -1) >= info.iteration
    before = next((one for one in reversed(history.starts if history else ())
                   if one.get("done", step) <= info.iteration), {})
    options = start["options"] if begun_here else info.args
    if step > options["train_iters"]:
        raise InputError(
            f"{run} is a run of {options['train_iters']} steps and STEP is {step}; give one of its "
            f"steps."
        )
    there = len(list(info.path.glob(LOADER.format("[0-9]" * 5))))
    layout = _layout(options, start["layout"]["dp"] if begun_here else there)
    config = _config(run, info, options, given, on_cpu=on_cpu)
    size = layout.dp if dp is None else dp
    if size < 1 or layout.dp % size:
        raise InputError(
            f"--dp is {size}, and the run's rows are those of {layout.dp} data-parallel ranks, "
            f"which its ranks have to share evenly; give a divisor of {layout.dp}."
        )
    if rank is not None and not 0 <= rank < layout.world_size:
        raise InputError(
            f"--rank is {rank} but the run has ranks 0 to {layout.world_size - 1}; give one of "
            f"them."
        )
    plan = plan_run(config, config.parallel.layout_size * size)
    check_paths(plan.config)
    return Replay(
        run=run, step=step, checkpoint=info, plan=plan, layout=layout,
        recorded=next((one for one in history.steps if one["iteration"] == step), None)
        if history else None,
        replica=None if rank is None else layout.coordinates(rank).dp,
        note=_changed(before, start),
    )


def _changed(before: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    """What a start behind the checkpoint changed, whose own checkpoint is no longer there."""
    had, has = (one.get("options", {}) for one in (before, start))
    names = [name for name in has if name in had and had[name] != has[name]
             and name not in _LEFT_OUT]
    if not names or start["done"] == before["done"]:
        return ""
    return (f"at step {start['done']} the run went on with another {', '.join(names)}, and its "
            f"checkpoint is gone; the steps before it are repeated with what came after, and are "
            f"not the run's")


def _checkpoint(run: Path, step: int) -> CheckpointInfo:
    there = iterations(run)
    before = [one for one in there if one < step]
    if not before:
        has = f"those there are of iterations {', '.join(map(str, there))}" if there else (
            "there is none at all")
        mend = f"a STEP above {there[0]}" if there else "a run's --save directory"
        raise InputError(f"{run} has no checkpoint before step {step}; {has}; give {mend}.")
    info = inspect_checkpoint(folder(run, before[-1]))
    if "train_iters" not in info.args:
        raise InputError(f"{info.path} does not say its run's options; give a run of `megatron-vl "
                         f"train`.")
    if info.args.get("no_save_optim"):
        raise InputError(
            f"{info.path} was saved with --no-save-optim, and no update can be made without the "
            f"optimizer's state; give a run that saves it."
        )
    if not list(info.path.glob(LOADER.format("*"))):
        raise InputError(f"{info.path} does not say where its run stood in its data; restore its "
                         f"{LOADER.format('*')}.")
    return info


def _history(run: Path, info: CheckpointInfo) -> History | None:
    """What the run wrote about its steps; None where that is not found."""
    given = info.args.get("metrics_file")
    paths = [run / METRICS] + ([Path(given)] if given else [])
    found = next((path for path in paths if path.is_file()), None)
    return None if found is None else read_history(found)


def _layout(options: Mapping[str, Any], dp: int) -> Layout:
    known = {f.name for f in fields(TrainConfig.from_dict({}).parallel)}
    own = TrainConfig.from_dict({name: one for name, one in options.items() if name in known})
    return own.parallel.layout(own.parallel.layout_size * dp)


def _config(
    run: Path, info: CheckpointInfo, options: Mapping[str, Any], given: Mapping[str, Any], *,
    on_cpu: bool,
) -> TrainConfig:
    """The run's options without what goes on or is kept, and with what is given instead."""
    beside = bool(info.adapter) and not options.get("save_base")
    if "load" in given and not beside:
        raise InputError(
            f"{info.path} holds all weights of the model, so --load is not read; leave it out."
        )
    values = {name: one for name, one in options.items() if name not in _LEFT_OUT}
    stages = ("pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank")
    if any(name in given and given[name] != options[name] for name in stages):
        values = {name: one for name, one in values.items() if name not in _STAGES}
    own = run if (run / "config.json").is_file() else options["hf_config"] or options["load"]
    values |= {
        "hf_config": str(own), "load": options["load"] if beside else str(info.path),
        "eval_interval": 0,
    }
    if on_cpu:
        values |= {"attention_backend": "auto", "fused_ops": "auto"}
    return TrainConfig.from_dict(values | given)
