"""`megatron-vl train ...`: start this node's processes, or be one of them.

Called by a person it checks what can be checked without a process group, then starts the node's
ranks with torchrun's own launcher. Called by torchrun (LOCAL_RANK is set) it is one rank.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_vl.cli.plan import CARD_NAMES
from megatron_vl.errors import FAILURE_FILE, Bounds, InputError
from megatron_vl.launch.cluster import (
    MACHINE,
    ClusterEnv,
    check_one_launcher,
    check_started,
    cluster_env,
)
from megatron_vl.launch.devices import check_devices, device_count
from megatron_vl.launch.worker import started_by_torchrun
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.options.config_sources import (
    add_arguments,
    given_options,
    load_config,
)

NODES = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port")
AUTO = "auto"
LAYOUT_FLAGS = ("layout", "gpu")
LAUNCH = (*NODES, "cluster_env", "rendezvous_timeout")
NOT_OPTIONS = {*LAUNCH, *LAYOUT_FLAGS, "command", "config", "show_config", "dry_run", "trace",
               "debug", "run", "argv"}


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
    parser.add_argument(
        "--trace", type=int, nargs="*", metavar="RANK",
        help="with --dry-run, trace these ranks' memory beside the predicted one; without a number "
        "one of the first, a middle, the last and the fullest stage",
    )
    layout = parser.add_argument_group("The layout, predicted as megatron-vl plan does.")
    layout.add_argument(
        "--layout", choices=("given", AUTO), default="given",
        help="auto: the first choice of megatron-vl plan for this run's options, its processes and "
        "--gpu; a resumed run keeps the one it began with; given (default): as the options say",
    )
    layout.add_argument(
        "--gpu", metavar="CARD",
        help=f"the card that layout auto and the prediction count with: {CARD_NAMES} "
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
    given, words = _config(args), []
    if args.trace is not None and not args.dry_run:
        raise InputError("--trace is of a run that is not started; give --dry-run with it.")
    if args.layout == AUTO:
        given, words = _with_layout(args, given)
    if args.show_config:
        import yaml

        print(yaml.safe_dump(given.to_dict(), sort_keys=False), end="")
        return 0
    from megatron_vl.training.checkpoint.start import with_local_models

    config = with_local_models(given, weights=not args.dry_run)
    if args.gpu is not None:
        from megatron_vl.planner.cards import read_card

        read_card(args.gpu)  # before ranks do
    if args.dry_run:
        from megatron_vl.training.dry_run import dry_run

        env, processes, _ = started_on(args)
        print(dry_run(config, nnodes=env.nnodes, nproc_per_node=processes, traced=args.trace))
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

    check_devices()  # which says more of what is missing than the plan does
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
        [*args.argv, *_found(given, config), *words], nproc_per_node=processes, nnodes=env.nnodes,
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
    return started_on(_parsed(words, command))


def layout_flags(words: list[str], *, command: str) -> list[str]:
    """The layout's flags, for behind `words`: what --layout auto comes to; none without it.

    Raises:
        InputError: see `started_on`; a layout that is given too, or nothing that fits.
        SystemExit: arguments that the parser refuses.
    """
    args = _parsed(words, command)
    return _with_layout(args, _config(args))[1] if args.layout == AUTO else []


def _parsed(words: list[str], command: str) -> argparse.Namespace:
    from megatron_vl.cli.main import Parser

    parser = Parser(prog="megatron-vl")
    commands = parser.add_subparsers()
    add_parser(commands)
    commands.choices["train"].prog = f"megatron-vl {command}"
    return parser.parse_args(["train", *words])


def started_on(args: argparse.Namespace) -> tuple[ClusterEnv, int, TrainConfig]:
    """The nodes of a run, the processes of each, and its options, before a layout is chosen.

    Raises:
        InputError: arguments, variables or options that cannot be used.
    """
    config, env = _config(args), _nodes(args)
    processes = env.nproc_per_node or device_count()
    if not processes and args.layout == AUTO:
        raise InputError(
            "--layout auto needs to know how many ranks there are, and this machine has no "
            "GPU; give --nproc-per-node.")
    return env, processes or config.parallel.layout_size, config


def _flags(args: argparse.Namespace) -> dict[str, object]:
    return {key: value for key, value in vars(args).items() if key not in NOT_OPTIONS}


def _config(args: argparse.Namespace) -> TrainConfig:
    return load_config(_flags(args), args.config)


def _with_layout(args: argparse.Namespace, config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The options with the layout that is chosen for them, and its flags for the ranks.

    Every node chooses by itself, of the same options; ranks compare theirs before they start.

    Raises:
        InputError: a layout that is given too, a card that is not known, or nothing that fits.
    """
    from megatron_vl.planner.auto import begun_with, check_free, choose
    from megatron_vl.planner.commands import flags
    from megatron_vl.training.checkpoint.start import with_local_models

    given = {name for name, value in given_options(_flags(args), args.config).items()
             if value is not None}
    check_free(given)
    here = with_local_models(config, weights=False)
    if started_by_torchrun():
        ranks, per_node = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    else:
        env, per_node, _ = started_on(args)
        ranks = per_node * env.nnodes
    chosen = begun_with(here, given, ranks) or choose(
        here, given, _card(args), ranks=ranks, per_node=per_node)
    usual = TrainConfig.from_dict({}).resolved()
    words = flags({name: value for name, value in chosen.options.items() if value != usual[name]})
    if os.environ.get("RANK", "0") == "0":
        comment = "# " if args.show_config else ""  # which is YAML
        print(f"{comment}{chosen.why}; {shlex.join(words)}", flush=True)
    config = TrainConfig.from_dict(config.to_dict() | chosen.options)
    return config, [*words, "--layout", "given"]


def _card(args: argparse.Namespace):
    """That of --gpu, or this machine's."""
    from megatron_vl.planner.cards import card_of, read_card

    if args.gpu is not None:
        return read_card(args.gpu)
    # Asked in a process of its own: a device's context stays with whoever asks.
    name = subprocess.run(
        [sys.executable, "-c", "from megatron_vl.platform import select_platform; "
         "print(select_platform().device_name())"], capture_output=True, text=True, check=True,
    ).stdout.strip()
    card = card_of(name)
    if card is None:
        raise InputError(
            f"--layout auto counts with a card's numbers, and this machine's {name} is none that "
            f"is known; give --gpu {CARD_NAMES}.")
    return card


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


def _run_rank(config, stop, gpu: str | None) -> None:
    from megatron_vl.planner.cards import read_card
    from megatron_vl.planner.in_run import compare
    from megatron_vl.training.rank import run_rank  # once the platform is there for Megatron-Core

    run_rank(config, stop, compare=partial(
        compare, card=None if gpu is None else read_card(gpu),
        per_node=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
    ))
