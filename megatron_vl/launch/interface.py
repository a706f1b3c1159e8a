"""Which network interface of this host the other nodes reach."""

from __future__ import annotations

import ipaddress
import socket

import psutil


def address_towards(peer: str, port: int) -> str:
    """This host's address on its way to `peer`; "" where there is no way. Nothing is sent."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(peer, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as one:
            one.connect(where)
            return one.getsockname()[0]
    except OSError:
        return ""


def interface_of(address: str) -> str | None:
    """The interface that has this address; None where none has."""
    return next((name for name, has in psutil.net_if_addrs().items()
                 if address in (one.address for one in has)), None)


def name_leads_here_alone() -> bool:
    """Whether this host's own name is unknown to it, or an address that no other host reaches.

    gloo listens at the address of the name; Debian and Ubuntu install with 127.0.1.1 for it.
    """
    try:
        found = socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return True
    return all(ipaddress.ip_address(one[4][0].partition("%")[0]).is_loopback for one in found)
