"""Lists of hosts as people and schedulers write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.errors import InputError, shown
from megatron_vl.launch.variables import MOST_NODES


def expand_nodelist(text: str, name: str = "SLURM_JOB_NODELIST") -> list[str]:
    """Slurm's list of hosts in order: `n[001-003,7],login` is n001, n002, n003, n7, login.

    Raises:
        InputError: it is no such list.
    """
    is_text = f"{name} is {shown(repr(text))}"
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not parts or ",".join(parts) != text:
        raise InputError(f"{is_text}, which is no list of hosts as n[001-004].")
    hosts = []
    for part in parts:
        names = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
            tails = [plain] if plain else _numbers(ranges, is_text)
            if len(hosts) + len(names) * len(tails) > MOST_NODES:
                raise InputError(f"{is_text}, which is more than {MOST_NODES:,} hosts.")
            names = [head + tail for head in names for tail in tails]
        hosts += names
    return hosts


def _numbers(ranges: str, is_text: str) -> list[str]:
    found: list[str] = []
    for one in ranges.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", one, re.ASCII)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(first) > int(last):
            raise InputError(f"{is_text}; [{shown(ranges)}] is no range of hosts as [001-004].")
        numbers = range(int(first), int(last) + 1)
        if len(found) + len(numbers) > MOST_NODES:
            raise InputError(f"{is_text}, which is more than {MOST_NODES:,} hosts.")
        found += [str(number).zfill(len(first)) for number in numbers]
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
    addresses: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        # A name that begins with a dash would be an option of ssh.
        found = re.fullmatch(r"([\w][\w.:@%-]*)(?:\s+slots=(\d{1,4}))?", line, re.ASCII)
        slots = int(found[2]) if found and found[2] else None
        if found is None or slots == 0:
            raise InputError(
                f"line {number} of {where} is {shown(repr(line))}; write a host as `10.0.0.1`, or "
                f"`10.0.0.1 slots=8`."
            )
        host = Host(name=found[1], slots=slots)
        if host.address in addresses:
            raise InputError(f"{where} names {shown(host.address)} twice; one line a host.")
        addresses.add(host.address)
        if hosts and host.slots != hosts[0].slots:
            raise InputError(
                f"{where} gives {shown(hosts[0].name)} slots={hosts[0].slots} but "
                f"{shown(host.name)} "
                f"slots={host.slots}; every node needs as many processes."
            )
        hosts.append(host)
    if not hosts:
        raise InputError(f"{where} names no host; write one a line, node 0 first.")
    return tuple(hosts)


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
