"""The wire between hosts: carries Ethernet frames between their TAP devices, in user space.

    unshare --net python wire.py

reads commands from standard input and answers each by `ok`:

    add NUMBER PID    give the network namespace of a process an `eth0`, host NUMBER's (1 to 250)
    cut NUMBER        lose every frame from and to this host; its link stays up
    mend NUMBER       undo `cut`
    delay SECONDS     hold every frame so long before it is delivered: half of a round trip
    loss FRACTION     lose so many of all frames, at random

It stands where a bridge would, because not every kernel has a qdisc that delays or loses frames. It
ends with its input, and its devices with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import sys
import time

SET_INTERFACE, TAP, NO_HEADER = 0x400454CA, 0x0002, 0x1000  # of <linux/if_tun.h>
LONGEST = 65536  # bytes of a frame
MTU = 60000  # few frames, because each one passes through this process
SEED = 0  # of which frames are lost


class Wire:
    def __init__(self) -> None:
        self.ports: dict[int, int] = {}  # host -> file descriptor of its device
        self.lost: set[int] = set()  # hosts that are cut off
        self.delay = self.loss = 0.0
        self.held: list[tuple[float, int, int, bytes]] = []  # when due, order, host, frame
        self.order, self.chance = itertools.count(), random.Random(SEED)

    def obey(self, name: str, *words: str) -> None:
        if name == "add":
            number, pid = int(words[0]), words[1]
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            here = f"tap{number}"
            fcntl.ioctl(device, SET_INTERFACE, struct.pack("16sH22x", here.encode(),
                                                           TAP | NO_HEADER))
            ip = ("ip", "link", "set", here)
            # Its address says whose it is.
            subprocess.run([*ip, "address", f"02:00:00:00:00:{number:02x}"], check=True)
            subprocess.run([*ip, "mtu", str(MTU)], check=True)
            subprocess.run([*ip, "netns", pid, "name", "eth0"], check=True)
            self.ports[number] = device
        elif name == "cut":
            self.lost.add(int(words[0]))
        elif name == "mend":
            self.lost.discard(int(words[0]))
        else:
            assert name in ("delay", "loss"), name
            setattr(self, name, float(words[0]))

    def take(self, source: int, frame: bytes) -> None:
        """Hold a frame until it is due, once for each host that it is for."""
        for host in self.ports if frame[0] & 1 else (frame[5],):  # an odd first byte: to a group
            reached = host != source and not self.lost & {host, source}
            if host in self.ports and reached and self.chance.random() >= self.loss:
                due = time.monotonic() + self.delay
                heapq.heappush(self.held, (due, next(self.order), host, frame))

    def deliver(self) -> None:
        while self.held and self.held[0][0] <= time.monotonic():
            _, _, host, frame = heapq.heappop(self.held)
            with contextlib.suppress(OSError):  # the host has ended, or its device is down or full
                os.write(self.ports[host], frame)

    def wait(self) -> list[int]:
        """File descriptors to read, standard input among them."""
        until = max(0.0, self.held[0][0] - time.monotonic()) if self.held else None
        return select.select([0, *self.ports.values()], [], [], until)[0]


def main() -> None:
    wire = Wire()
    while True:
        for ready in wire.wait():
            if ready == 0:
                line = os.read(0, LONGEST)  # one command at a time, for each is answered
                if not line:
                    return
                wire.obey(*line.decode().split())
                print("ok", flush=True)
                continue
            host = next(number for number, port in wire.ports.items() if port == ready)
            try:
                wire.take(host, os.read(ready, LONGEST))
            except BlockingIOError:
                pass
            except OSError:  # the host has ended
                os.close(wire.ports.pop(host))
        wire.deliver()


if __name__ == "__main__":
    sys.exit(main())
