"""The variables of an environment, and the sentences about those that cannot be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NoReturn

from megatron_vl.errors import InputError, shown

MOST_NODES = 2**16
MOST_PROCESSES = 1024  # of a node
_DIGITS = 18  # of a number that is an id and no count
MEND = "correct one of them, or give --nnodes, --node-rank, --master-addr and --master-port"


class Variables:
    """An environment; every refusal names the variable and what it holds."""

    def __init__(self, environ: Mapping[str, str]):
        self.environ = environ

    def text(self, name: str) -> str | None:
        return self.environ.get(name, "").strip() or None

    def number(self, name: str, least: int = 0) -> int | None:
        text = self.text(name)
        if text is None:
            return None
        if not re.fullmatch(rf"\d{{1,{_DIGITS}}}", text, re.ASCII) or int(text) < least:
            raise InputError(
                f"{name} is {shown(repr(text))}; it must be a whole number of at least {least}."
            )
        return int(text)

    def port(self, name: str) -> int | None:
        port = self.number(name, 1)
        if port is not None and port >= 2**16:
            raise InputError(f"{name} is {port}; a port is from 1 to 65535.")
        return port

    def need(self, name: str, source: str, read: Callable) -> int | str:
        value = read(name)
        if value is None:
            raise InputError(
                f"{name} is not set although this looks like {source}; set it, or give --nnodes, "
                f"--node-rank, --master-addr and --master-port."
            )
        return value

    def rank(self, name: str, nodes: str, nnodes: int, source: str) -> int:
        """This node's number out of `name`; alone, a node needs none."""
        rank = self.number(name)
        if rank is None and nnodes == 1:
            return 0
        rank = self.need(name, source, self.number)
        if rank >= nnodes:
            raise InputError(
                f"{name} is {rank} but {nodes} is {nnodes}, so it goes from 0 to {nnodes - 1}; "
                f"{MEND}."
            )
        return rank

    def processes(self, gpus: str | None = None) -> int | None:
        """NPROC_PER_NODE, which a user sets; else a scheduler's count of GPUs, if it has any."""
        count = self.number("NPROC_PER_NODE", 1)
        return count or (self.number(gpus) if gpus else None) or None

    def address(self, first: str | None, nnodes: int, source: str) -> str:
        """MASTER_ADDR, else the `first` host of the scheduler's list."""
        address = self.text("MASTER_ADDR") or first
        if address is None and nnodes > 1:
            address = self.need("MASTER_ADDR", source, self.text)
        return address or "127.0.0.1"

    def same(self, read: Callable, *names: str):
        """The value of the first name that is set, when no other one says something else."""
        given = [(name, value) for name in names if (value := read(name)) is not None]
        for name, value in given[1:]:
            if value != given[0][1]:
                contradiction(*given[0], name, value)
        return given[0][1] if given else None


def contradiction(one: str, value, other: str, instead) -> NoReturn:
    raise InputError(f"{one} is {shown(value)} but {other} is {shown(instead)}; {MEND}.")
