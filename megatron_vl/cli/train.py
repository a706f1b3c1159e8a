"""`megatron-vl train ...`: start this node's processes, or be one of them.

Called by a person it checks what can be checked without a process group, then starts the node's
ranks with torchrun's own launcher. Called by torchrun (LOCAL_RANK is set) it is one rank.
"""

from __future__ import annotations

import argparse
import os

from megatron_vl.cli.worker import started_by_torchrun
from megatron_vl.errors import InputError
from megatron_vl.training.config import add_arguments, load_config

LAUNCH = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port")
NOT_OPTIONS = {*LAUNCH, "command", "config", "show_config", "debug", "run", "argv"}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "train", help="pretrain or finetune", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="YAML", help="file with the same options as keys")
    parser.add_argument(
        "--show-config", action="store_true", help="print the resolved options and stop"
    )
    launch = parser.add_argument_group("Processes of this node, when torchrun did not start them.")
    launch.add_argument(
        "--nproc-per-node", type=int,
        help="processes (default: this node's GPUs; without any, TP x PP x CP)",
    )
    launch.add_argument("--nnodes", type=int, default=1, help="nodes (default: 1)")
    launch.add_argument("--node-rank", type=int, default=0, help="this node's number (default: 0)")
    launch.add_argument("--master-addr", default="127.0.0.1", help="node 0's address")
    launch.add_argument("--master-port", type=int, default=29500, help="a free port of node 0")
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    flags = {key: value for key, value in vars(args).items() if key not in NOT_OPTIONS}
    config = load_config(flags, args.config)
    if args.show_config:
        import yaml

        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
        return 0
    if started_by_torchrun():
        from megatron_vl.cli.worker import run_worker

        run_worker(lambda: _train(config), command="train", debug=args.debug)
    from megatron_vl.training.plan import check_paths, find_checkpoint, plan_run

    if args.nproc_per_node is None:
        args.nproc_per_node = _processes(config)
    if min(args.nproc_per_node, args.nnodes) < 1:
        raise InputError(
            f"nproc-per-node is {args.nproc_per_node} and nnodes {args.nnodes}; give at least 1."
        )
    if not 0 <= args.node_rank < args.nnodes:
        raise InputError(
            f"node-rank {args.node_rank} is not one of the {args.nnodes} node(s); number them from "
            f"0 to {args.nnodes - 1}."
        )
    plan = plan_run(config, args.nproc_per_node * args.nnodes)
    find_checkpoint(plan)
    check_paths(config)
    from megatron_vl.cli.launch import launch

    return launch(args.argv, **{name: getattr(args, name) for name in LAUNCH})


def _processes(config) -> int:
    import torch

    return torch.cuda.device_count() or config.parallel.layout_size


def _train(config) -> None:
    from megatron_vl.training.loop import train
    from megatron_vl.training.plan import check_paths, plan_run

    if os.environ["RANK"] == "0":  # another launcher than ours has not looked
        check_paths(config)
    train(plan_run(config, int(os.environ["WORLD_SIZE"])))
