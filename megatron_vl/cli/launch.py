"""`megatron-vl launch`: a command on every host; gives back the first failure's exit code."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.launch.ascend import passed_on
from megatron_vl.launch.cluster import PORT
from megatron_vl.launch.hostfile import read_hostfile
from megatron_vl.launch.hosts import run_on_hosts


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "launch",
        help="one command on every host",
        description="Run one command on every host of a hostfile over ssh, in this directory, with "
        "the variables of PAI-DLC set, so that each host knows its place. Lines are printed behind "
        "their host's name. When a host fails, the others are ended.",
        epilog="example: megatron-vl launch --hostfile HOSTS -- train --config run.yaml",
    )
    parser.add_argument("--hostfile", type=Path, required=True, metavar="FILE",
                        help="`host` or `host slots=8` a line, node 0 first")
    parser.add_argument("--ssh", default="ssh", metavar="COMMAND",
                        help='with its options, as "ssh -p 22" (default: ssh)')
    parser.add_argument("--master-port", type=int, default=PORT,
                        help=f"a free port of the first host (default: {PORT})")
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]",
                        help="a variable for the command, without VALUE the one it has here; may "
                        "be repeated; those of CANN and HCCL, of Ascend NPUs, are passed anyway")
    parser.add_argument("words", nargs="+", metavar="WORD",
                        help="behind --: a command of megatron-vl and its options, started with "
                        "this Python, or any other program")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_vl.cli.main import COMMANDS

    hosts = read_hostfile(args.hostfile)
    try:
        ssh = shlex.split(args.ssh)
    except ValueError:
        ssh = []
    if not ssh:
        raise InputError(f"--ssh is {args.ssh!r}; give a command as 'ssh -p 22'.")
    if not 0 < args.master_port < 2**16:
        raise InputError(f"master-port is {args.master_port}; give one from 1 to 65535.")
    variables = _variables(args.env)
    if "NPROC_PER_NODE" in variables and any(host.slots is not None for host in hosts):
        raise InputError(
            f"--env NPROC_PER_NODE: {args.hostfile} says the processes of a host as slots; leave "
            f"out one of the two."
        )
    own = {name: value for name, value in passed_on(os.environ).items() if name not in variables}
    if own:
        print(f"megatron-vl launch: every host gets this one's {', '.join(own)}", file=sys.stderr)
    command, package = args.words, ""
    if command[0] in COMMANDS:
        command, package = [sys.executable, "-m", "megatron_vl", *command], "megatron_vl"
    return run_on_hosts(
        hosts, command, ssh=ssh, port=args.master_port, directory=os.getcwd(),
        variables=own | variables, package=package,
    )


# Variables that hosts know their place by -> what says it.
_OURS = {
    "MASTER_PORT": "from --master-port", "WORLD_SIZE": "to the number of hosts in the hostfile",
    "RANK": "to a host's place in the hostfile",
}


def _variables(given: list[str]) -> dict[str, str]:
    variables = {}
    for word in given:
        name, has_value, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise InputError(f"--env {word} names no variable; write NAME or NAME=VALUE.")
        if not has_value:
            if name not in os.environ:
                raise InputError(f"--env {name}: {name} is not set here; give {name}=VALUE.")
            value = os.environ[name]
        if name in _OURS:
            raise InputError(f"--env {name}: launch sets it itself, {_OURS[name]}.")
        variables[name] = value
    return variables
