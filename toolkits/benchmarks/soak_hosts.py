"""The soak over hosts of namespaces: `soak.py ... --hosts 2`, as root. See tests/hosts."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import sys
import time
from pathlib import Path

import psutil
from soak import GONE, HANG_TIMEOUT, MOST_STEPS, Soak, command

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
from hosts import Hosts, why_not  # noqa: E402

MEET_TIMEOUT = 60  # seconds: --rendezvous-timeout


class HostsSoak(Soak):
    """The same job over several hosts, started by `megatron-vl launch` on a further one."""

    def __init__(self, args: argparse.Namespace):
        if reason := why_not():
            sys.exit(f"--hosts: {reason}")
        super().__init__(args)
        args.out = args.out.resolve()
        self.numbers = itertools.count(1)
        (args.out / "hosts").mkdir()
        self.hosts = Hosts(args.out / "hosts", "desk")
        self.names = [self.new() for _ in range(args.hosts)]

    def new(self) -> str:
        return self.hosts.add(f"host{next(self.numbers)}").name

    def start(self) -> None:
        self.started += 1
        hostfile = self.args.out / "hostfile"
        hostfile.write_text("".join(f"{name}\n" for name in self.names))
        words = command(
            self.args, MOST_STEPS, self.save.resolve(), self.metrics.resolve(),
            "--save-total-limit", 3, "--hang-timeout", HANG_TIMEOUT, "--max-restarts", 10**6,
            "--rendezvous-timeout", MEET_TIMEOUT,
            "--nproc-per-node", self.args.tp * self.args.pp // self.args.hosts,
        )
        self.job = self.hosts["desk"].start(
            [sys.executable, "-m", "megatron_vl", "launch", "--hostfile", hostfile,
             "--env", "PYTHONPATH", "--env", "OMP_NUM_THREADS", "--", *words[3:]], cwd=ROOT)

    def said(self) -> str:
        return "".join(log.read_text() for log in sorted((self.args.out / "hosts").glob("job*")))

    def restarts(self) -> int:
        return super().restarts() // self.args.hosts  # each host says so

    def ranks(self) -> list[psutil.Process]:
        found = []
        for one in (one for name in self.names for one in self.hosts[name].processes("megatron")):
            with contextlib.suppress(*GONE):
                if "LOCAL_RANK" in one.environ() and "LOCAL_RANK" not in one.parent().environ():
                    found.append(one)
        return found

    def stop(self) -> bool:
        self.job.signal(signal.SIGTERM)
        return self.job.wait(timeout=120) == 128 + signal.SIGTERM

    # ---- faults -------------------------------------------------------------------------------

    def kill_everything(self) -> None:
        self.job.signal(signal.SIGKILL)
        self.job.wait()
        while self.ranks():
            time.sleep(0.1)
        self.start()

    def cut_a_link_for_a_while(self) -> None:
        host = self.hosts[self.chance.choice(self.names)]
        host.cut()
        time.sleep(self.chance.uniform(1, HANG_TIMEOUT / 3))
        host.mend()

    def cut_a_link_beyond_the_hang_timeout(self) -> None:
        host, count = self.hosts[self.names[-1]], self.said().count("waiting up to")
        host.cut()
        self.wait_for(lambda: self.said().count("waiting up to") > count)
        host.mend()

    def kill_a_host(self) -> None:
        """Another one takes its place, and the command is given again."""
        place = self.chance.randrange(len(self.names))
        self.hosts[self.names[place]].kill()
        if self.job.wait(timeout=6 * HANG_TIMEOUT + MEET_TIMEOUT) == 0:
            raise RuntimeError("a run whose host died ended with 0")
        self.names[place] = self.new()
        self.start()

    FAULTS = (
        Soak.kill_a_rank, Soak.kill_every_rank, Soak.kill_during_a_save, Soak.ask_to_stop,
        kill_everything, cut_a_link_for_a_while, cut_a_link_beyond_the_hang_timeout, kill_a_host,
    )
