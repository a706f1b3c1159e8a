"""`megatron-vl replay RUN STEP`: one step of a run again, and what was in it.

It starts from the run's last checkpoint before STEP and repeats the steps from there, on the rows
that the run had. It reports the loss beside the run's own, the gradient norm by layer, the largest
outputs of modules or the first that is not finite, and the samples with their losses. Nothing is
written but a page.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.launch.worker import started_by_torchrun
from megatron_vl.outputs import with_suffix
from megatron_vl.training.options.config_sources import add_some_arguments
from megatron_vl.training.options.groups import (
    CheckpointOptions,
    DataOptions,
    ParallelOptions,
)

_PATHS = ((CheckpointOptions, ("load", "hf_config")), (DataOptions, ("train_data_path",)))
_LAYOUT = tuple(f.name for f in fields(ParallelOptions))


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "replay", help="one step of a run again, and what was in it", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="RUN", type=Path, help="a run's --save directory")
    parser.add_argument("step", metavar="STEP", type=int, help="the step, counted from 1")
    parser.add_argument(
        "--rank", type=int, metavar="R",
        help="a rank of the run: report the rows and outputs of its replica alone (default: all)",
    )
    parser.add_argument("--device", choices=("cpu",),
                        help="compute there (default: this machine's GPUs, else the CPU)")
    parser.add_argument("--out", help="page to write (default: replay-STEP.html)")
    moved = parser.add_argument_group("Paths that moved since; default: the run's own.")
    for group, names in _PATHS:
        add_some_arguments(moved, group, names)
    layout = parser.add_argument_group("Another layout; default: the run's own.")
    layout.add_argument("--dp", type=int,
                        help="data-parallel size (DP), a divisor of the run's")
    add_some_arguments(layout, ParallelOptions, _LAYOUT)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_vl.platform import use_cpu
    from megatron_vl.training.replay.source import find_replay

    if args.device == "cpu":
        use_cpu()
    page = with_suffix(args.out or f"replay-{args.step}.html", (".html", ".htm"), "--out")
    if page.resolve().is_relative_to(args.source.resolve()):
        raise InputError(f"{page} lies within {args.source}, where nothing is written; give --out "
                         f"another place.")
    names = (*_LAYOUT, *(name for _, group in _PATHS for name in group))
    given = {name: one for name, one in vars(args).items() if name in names}
    replay = find_replay(
        args.source, args.step, given, dp=args.dp, rank=args.rank, on_cpu=args.device == "cpu"
    )
    if started_by_torchrun():
        from megatron_vl.launch.worker import run_worker

        run_worker(lambda: _run_rank(replay, page), command="replay", debug=args.debug)
    from megatron_vl.launch.launcher import launch

    return launch(args.argv, nproc_per_node=replay.plan.layout.world_size)


def _run_rank(replay, page: Path) -> None:
    from megatron_vl.training.replay.run import run_replay  # once the platform is installed

    run_replay(replay, page)
