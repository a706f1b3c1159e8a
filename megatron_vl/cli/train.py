"""`megatron-vl train ...`: start this node's processes, or be one of them.

Called by a person it checks what can be checked without a process group, then starts the node's
ranks with torchrun's own launcher. Called by torchrun (LOCAL_RANK is set) it is one rank.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_vl.errors import FAILURE_FILE, Bounds, InputError
from megatron_vl.launch.cluster import (
    MACHINE,
    ClusterEnv,
    check_one_launcher,
    check_started,
    cluster_env,
)
from megatron_vl.launch.worker import started_by_torchrun
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.options.config_sources import add_arguments, load_config

CARDS = "h200, h100-80g, a100-80g, a100-40g, a800, mi300x, 910b, l40s, 24g, 16g, or a FILE.json"
NODES = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port")
LAYOUT_FLAGS = ("layout", "gpu")
LAUNCH = (*NODES, "cluster_env", "rendezvous_timeout")
NOT_OPTIONS = {*LAUNCH, *LAYOUT_FLAGS, "command", "config", "show_config", "dry_run", "debug",
               "run", "argv"}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "train", help="pretrain or finetune", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="YAML", help="file with the same options as keys")
    parser.add_argument(
        "--show-config", action="store_true", help="print the resolved options and stop"
    )
    parser.add_argument(
        "--dry-run", action="store_true",
        help="check the run as a start does, print its layout and what every rank holds, and "
        "stop; needs config.json alone",
    )
    layout = parser.add_argument_group("The layout, predicted as megatron-vl plan does.")
    layout.add_argument(
        "--layout", choices=("given", "auto"), default="given",
        help="auto: the first choice of megatron-vl plan for this run's options, its processes and "
        "--gpu; a resumed run keeps the one it began with; given (default): as the options say",
    )
    layout.add_argument(
        "--gpu", metavar="CARD",
        help=f"the card that layout auto and the prediction count with: {CARDS} "
        "(default: this machine's, by its name)",
    )
    launch = parser.add_argument_group("Processes of this node, when torchrun did not start them.")
    launch.add_argument(
        "--nproc-per-node", type=int,
        help="processes (default: this node's GPUs; without any, TP x PP x CP)",
    )
    launch.add_argument("--nnodes", type=int, help="nodes (default: the scheduler's, else 1)")
    launch.add_argument("--node-rank", type=int, help="this node's number, from 0")
    launch.add_argument("--master-addr", help="node 0's address")
    launch.add_argument("--master-port", type=int, help="a free port of node 0 (default: 29500)")
    launch.add_argument(
        "--cluster-env", action=argparse.BooleanOptionalAction,
        help="take what the flags above leave out from the scheduler's variables, and refuse a "
        "machine that has none; --no-cluster-env never looks at them; default: look unless "
        "--nnodes is given",
    )
    launch.add_argument(
        "--rendezvous-timeout", type=float, default=900.0, metavar="SECONDS",
        help="how long a node waits for the others at the start (default: 900)",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    given = _config(args)
    if args.show_config:
        import yaml

        print(yaml.safe_dump(given.to_dict(), sort_keys=False), end="")
        return 0
    from megatron_vl.training.checkpoint.start import with_local_models

    config = with_local_models(given, weights=not args.dry_run)
    if args.dry_run:
        from megatron_vl.training.dry_run import dry_run

        env, processes, _ = started_on(args)
        print(dry_run(config, nnodes=env.nnodes, nproc_per_node=processes))
        return 0
    if started_by_torchrun():
        if FAILURE_FILE not in os.environ and _looks(args):  # our own launcher has looked
            check_started(os.environ)
        from megatron_vl.launch.stop import StopRequest
        from megatron_vl.launch.worker import STOP, beside_failure, run_worker

        stop = StopRequest(beside_failure(STOP))
        if config.checkpoint.save is not None:  # without it there is nothing to do but to end
            stop.listen()
        run_worker(lambda: _run_rank(config, stop, args.gpu), command="train", debug=args.debug)
    from megatron_vl.training.checkpoint.lock import check_free
    from megatron_vl.training.checkpoint.start import check_weights, find_checkpoint
    from megatron_vl.training.epochs import with_steps
    from megatron_vl.training.paths import check_paths
    from megatron_vl.training.plan import plan_run

    config = with_steps(config)
    env, processes, _ = started_on(args)
    plan = plan_run(config, processes * env.nnodes)
    check_weights(plan.config, plan.spec, *find_checkpoint(plan.config, plan.spec))
    check_paths(config)
    if config.checkpoint.save is not None and env.node_rank == 0:
        check_free(Path(config.checkpoint.save))
    from megatron_vl.launch.launcher import launch

    if env.source != MACHINE:
        print(f"node {env.node_rank} of {env.nnodes}, {processes} processes each, node 0 is "
              f"{env.master_addr}:{env.master_port} ({env.source})", flush=True)
    return launch(
        [*args.argv, *_found(given, config)], nproc_per_node=processes, nnodes=env.nnodes,
        node_rank=env.node_rank, master_addr=env.master_addr, master_port=env.master_port,
        rendezvous_timeout=args.rendezvous_timeout,
        max_restarts=0 if config.checkpoint.save is None else config.fault.max_restarts,
        saves=config.checkpoint.save is not None,
    )


def started_with(
    words: list[str], *, command: str = "train"
) -> tuple[ClusterEnv, int, TrainConfig]:
    """`started_on` of unparsed arguments; `command` is the one whose user typed them.

    Raises:
        InputError: see `started_on`.
        SystemExit: arguments that the parser refuses.
    """
    from megatron_vl.cli.main import Parser

    parser = Parser(prog="megatron-vl")
    commands = parser.add_subparsers()
    add_parser(commands)
    commands.choices["train"].prog = f"megatron-vl {command}"
    return started_on(parser.parse_args(["train", *words]))


def started_on(args: argparse.Namespace) -> tuple[ClusterEnv, int, TrainConfig]:
    """The nodes of a run, the processes of each, and its options.

    Raises:
        InputError: arguments, variables or options that cannot be used.
    """
    config, env = _config(args), _nodes(args)
    return env, env.nproc_per_node or _processes(config), config


def _config(args: argparse.Namespace) -> TrainConfig:
    flags = {key: value for key, value in vars(args).items() if key not in NOT_OPTIONS}
    return load_config(flags, args.config)


def _nodes(args: argparse.Namespace) -> ClusterEnv:
    """What the flags say; what they leave out, from the scheduler; else this machine alone."""
    Bounds(above=0, most=1_200_000).check("rendezvous-timeout", args.rendezvous_timeout)
    env = ClusterEnv()
    if _looks(args):
        env = cluster_env(os.environ)
        check_one_launcher(os.environ, env)
    if args.cluster_env and env.source == MACHINE:
        raise InputError(
            "cluster-env needs a scheduler's variables, in DLC WORLD_SIZE, RANK and "
            "MASTER_ADDR, and none is set; submit through the scheduler, or use no-cluster-env "
            "for this machine alone."
        )
    given = {name: getattr(args, name) for name in NODES if getattr(args, name) is not None}
    return replace(env, **given)


def _found(given: TrainConfig, config: TrainConfig) -> list[str]:
    """Where models were found that were given by name, as flags for the ranks."""
    return [word for name in ("load", "hf_config")
            if (path := getattr(config.checkpoint, name)) != getattr(given.checkpoint, name)
            for word in (f"--{name.replace('_', '-')}", path)]


def _looks(args: argparse.Namespace) -> bool:
    """Whether the scheduler's variables are asked."""
    return args.nnodes is None if args.cluster_env is None else args.cluster_env


def _processes(config) -> int:
    from megatron_vl.platform import select_platform

    return select_platform().device_count() or config.parallel.layout_size


def _run_rank(config, stop, gpu: str | None) -> None:
    from megatron_vl.planner.cards import read_card
    from megatron_vl.planner.in_run import compare
    from megatron_vl.training.rank import run_rank  # once the platform is there for Megatron-Core

    run_rank(config, stop, compare=partial(
        compare, card=None if gpu is None else read_card(gpu),
        per_node=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
    ))
