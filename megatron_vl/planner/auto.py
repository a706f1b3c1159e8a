"""`train --layout auto`: the plan's first choice as options of a run, or those it began with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace

from megatron_vl.errors import InputError
from megatron_vl.planner.cards import Card
from megatron_vl.planner.nothing_fits import nothing_fits
from megatron_vl.planner.search import Question, search
from megatron_vl.training.checkpoint.start import hf_directory, source_of, weights_alone
from megatron_vl.training.dry_run import GIB
from megatron_vl.training.options.config import LENGTHS, TrainConfig
from megatron_vl.training.options.groups import GROUPS, ParallelOptions

LAYOUT = tuple(one.name for one in fields(ParallelOptions)
               if one.name != "distributed_timeout_minutes")
# Chosen with it, and kept when a run is resumed.
BESIDE = ("micro_batch_size", "recompute_granularity", "vit_recompute_granularity",
          "overlap_grad_reduce", "optimizer_cpu_offload", "optimizer_offload_fraction")
# Of these groups nothing changes what fits or how fast it is, nor do these options.
ASIDE = ("checkpoint", "fault", "log")
LEFT_OUT = (*LENGTHS, "train_iters", "exit_interval", "exit_duration_in_mins", "early_stop",
            "train_data_path", "valid_data_path", "lr_warmup_iters", "lr_warmup_fraction",
            "lr_decay_iters")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """A layout, and why it is that."""

    options: dict[str, object]
    why: str


def check_free(given: Collection[str]) -> None:
    """Raises InputError: an option says the layout by hand; `given` are names of options."""
    if named := [name.replace("_", "-") for name in LAYOUT if name in given]:
        raise InputError(
            f"--layout auto chooses the layout, and --{named[0]} says a part of it; leave out one "
            f"of them.")


def begun_with(config: TrainConfig, given: Collection[str], ranks: int) -> Chosen | None:
    """The layout of the run that is resumed; None where SAVE holds nothing that was trained.

    Raises:
        InputError: so many ranks cannot have it.
    """
    info, own = source_of(config)
    if not own or weights_alone(config, info, own):
        return None
    options = {name: info.args[name] for name in (*LAYOUT, *BESIDE)
               if name in info.args and name not in given}
    parallel = replace(config.parallel, **{name: options[name] for name in LAYOUT
                                           if name in options})
    try:
        layout = parallel.layout(ranks)
    except InputError as error:
        raise InputError(
            f"--layout auto keeps the layout of {info.path}, and {ranks} ranks cannot have it: "
            f"{error} For another layout, give its options in place of --layout auto."
        ) from None
    return Chosen(options=options, why=f"layout auto: {layout}, as {info.path} was trained")


def choose(config: TrainConfig, given: Collection[str], card: Card, *, ranks: int,
           per_node: int) -> Chosen:
    """The first choice of `megatron-vl plan` for a run's options, on so many ranks.

    Args:
        given: names of options that are kept as they are.

    Raises:
        InputError: nothing fits, or options that no layout could mend.
    """
    usual = TrainConfig.from_dict({}).resolved()
    options = {
        name: value for name, value in config.resolved().items()
        if name in _SEARCHED and (value != usual[name] or name in given)
    }
    options |= {name: config.resolved()[name] for name in ("bf16", "seq_length",
                                                           "global_batch_size")}
    hf_dir = hf_directory(config)
    if hf_dir is None:
        raise InputError("--layout auto needs the model: give --load, or --hf-config.")
    question = Question(
        hf_dir=hf_dir, gpus=ranks, per_node=per_node, card=card, options=options,
        fixed=frozenset(given),
    )
    found = search(question)
    if not found.best:
        raise nothing_fits(question, found, more="{} ranks")
    best = found.best[0]
    assert {*best.options} <= {*LAYOUT, *BESIDE}, "a resumed run would not keep it"
    return Chosen(
        options={name: value for name, value in best.options.items() if name not in given},
        why=f"layout auto: {best.plan.layout}, by prediction the fastest of {found.fit:,} ways to "
            f"run that fit {ranks} x {card.name}: {best.tokens_per_second:,.0f} tokens/s, "
            f"{best.worst.bytes / GIB:.2f} of {card.room / GIB:.2f} GiB on the fullest rank",
    )


_SEARCHED = {one.name for group, owner in GROUPS.items() if group not in ASIDE
             for one in fields(owner)} - set(LEFT_OUT) - set(LAYOUT)
