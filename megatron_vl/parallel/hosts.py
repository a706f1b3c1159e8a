"""Lists of hosts as people and schedulers write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_vl.errors import InputError


def expand_nodelist(text: str, name: str = "SLURM_JOB_NODELIST") -> list[str]:
    """Slurm's list of hosts in order: `n[001-003,7],login` is n001, n002, n003, n7, login.

    Raises:
        InputError: it is no such list.
    """
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not parts or ",".join(parts) != text:
        raise InputError(f"{name} is {text!r}, which is no list of hosts as n[001-004].")
    hosts = []
    for part in parts:
        names = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
            tails = [plain] if plain else _range(ranges, text, name)
            names = [head + tail for head in names for tail in tails]
        hosts += names
    return hosts


def _range(ranges: str, text: str, name: str) -> list[str]:
    found = []
    for one in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", one, re.ASCII)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(first) > int(last):
            raise InputError(f"{name} is {text!r}; [{ranges}] is no range of hosts as [001-004].")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A line of a hostfile."""

    name: str  # as ssh takes it: an address, a name, or user@name
    slots: int | None = None  # processes to start there

    @property
    def address(self) -> str:
        return self.name.rpartition("@")[2]


def parse_hostfile(text: str, where: str) -> tuple[Host, ...]:
    """Hosts of a hostfile, node 0 first: `host` or `host slots=8` a line, `#` begins a comment.

    Raises:
        InputError: a line that is neither, a host twice, unequal slots, or no host at all.
    """
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        # A name that begins with a dash would be an option of ssh.
        found = re.fullmatch(r"([\w][\w.:@%-]*)(?:\s+slots=(\d+))?", line, re.ASCII)
        if found is None or found[2] == "0":
            raise InputError(
                f"line {number} of {where} is {line!r}; write a host as `10.0.0.1`, or "
                f"`10.0.0.1 slots=8`."
            )
        host = Host(name=found[1], slots=int(found[2]) if found[2] else None)
        if host.address in [other.address for other in hosts]:
            raise InputError(f"{where} names {host.address} twice; one line a host.")
        if hosts and host.slots != hosts[0].slots:
            raise InputError(
                f"{where} gives {hosts[0].name} slots={hosts[0].slots} but {host.name} "
                f"slots={host.slots}; every node needs as many processes."
            )
        hosts.append(host)
    if not hosts:
        raise InputError(f"{where} names no host; write one a line, node 0 first.")
    return tuple(hosts)
