"""`megatron-vl cluster-env [FIELD]`: which node of how many this is."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import socket
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.parallel.cluster import ClusterEnv, cluster_env, hostfile_env
from megatron_vl.parallel.hosts import Host, parse_hostfile

# What drivers of GPUs make: NVIDIA's, those of its boards and of Windows' Linux, and AMD's.
DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
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
        values["nproc_per_node"] = _devices()
    if args.field:
        print(values[args.field])
    else:
        for name in (*FIELDS, "source"):
            print(f"{name}={shlex.quote(str(values[name]))}")
    return 0


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Raises InputError: no such file, or see `parse_hostfile`."""
    from megatron_vl.inputs import read_text  # and PyYAML, for which no other field waits

    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the hostfile {path} cannot be read ({error}); give a text file."
        ) from error
    return parse_hostfile(text, str(path))


def _from_hostfile(path: Path) -> ClusterEnv:
    name = socket.gethostname()
    own = {name, name.partition(".")[0], socket.getfqdn()}
    with contextlib.suppress(socket.gaierror):  # a name that nothing resolves: names alone
        own.update(info[4][0] for info in socket.getaddrinfo(name, None))
    return hostfile_env(read_hostfile(path), os.environ, own)


def _devices() -> int:
    """Processes of this node when nobody says: one a GPU, or one.

    torch takes seconds to import, and is asked only where there may be a GPU.
    """
    if sys.platform == "linux" and not any(map(os.path.exists, DRIVERS)):
        return 1
    from megatron_vl.platform import select_platform

    return select_platform().device_count() or 1
