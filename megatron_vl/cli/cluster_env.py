"""`megatron-vl cluster-env [FIELD]`: which node of how many this is."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import socket
from dataclasses import asdict
from pathlib import Path

from megatron_vl.launch.cluster import ClusterEnv, cluster_env, hostfile_env
from megatron_vl.launch.devices import devices
from megatron_vl.launch.hostfile import read_hostfile

FIELDS = ("nnodes", "master_addr", "master_port", "nproc_per_node", "node_rank")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "cluster-env",
        help="which node of how many this is",
        description="Print what the scheduler's environment variables, or a hostfile, say about "
        "the nodes of this run: one value bare, or all as name=value lines, and which row of the "
        "table in docs/clusters.md gave them.",
    )
    parser.add_argument("field", nargs="?", choices=FIELDS, metavar="FIELD",
                        help=f"one of {', '.join(FIELDS)} (default: all)")
    parser.add_argument("--hostfile", type=Path, metavar="FILE",
                        help="hosts, one a line, instead of the environment")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    env = _from_hostfile(args.hostfile) if args.hostfile else cluster_env(os.environ)
    values = asdict(env)
    if env.nproc_per_node is None and args.field in (None, "nproc_per_node"):
        values["nproc_per_node"] = devices()
    if args.field:
        print(values[args.field])
    else:
        for name in (*FIELDS, "source"):
            print(f"{name}={shlex.quote(str(values[name]))}")
    return 0


def _from_hostfile(path: Path) -> ClusterEnv:
    name = socket.gethostname()
    own = {name, name.partition(".")[0], socket.getfqdn()}
    with contextlib.suppress(socket.gaierror):  # a name that nothing resolves: names alone
        own.update(info[4][0] for info in socket.getaddrinfo(name, None))
    return hostfile_env(read_hostfile(path), os.environ, own)
