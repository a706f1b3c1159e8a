"""A run that is hit by faults for minutes on end: what it cost, what it leaked, where it ended.

    python soak.py HF_DIR DATASET OUT [--minutes 20] [--every 40] [--seed 0] [--pp 2] [--tp 1]
                   [--hosts 2]

Trains under `megatron-vl train` with checkpoints behind training, and about every so many seconds
does to it one of FAULTS, in turn and at random moments. The last third of the time is calm: there
memory and open files of every rank are watched. At the end the run is asked to stop, as a scheduler
would, and the same number of steps is done without faults: the losses must be the same, to the bit.
OUT gets both runs and soak.json. The exit code is 1 if the losses differ, or a fault was not
survived.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil

SAVE_INTERVAL = 20  # steps
MOST_STEPS = 10**6  # the time ends a run, not its steps
HANG_TIMEOUT = 30  # seconds
GONE = (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, FileNotFoundError)


class Soak:
    """The job, and what can be done to it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.chance = args, random.Random(args.seed)
        self.save = args.out / "faults" / "save"
        self.metrics = args.out / "faults" / "metrics.jsonl"
        self.log = args.out / "faults" / "log.txt"
        self.save.mkdir(parents=True)
        self.started = 0  # times the command was given
        self.done: Counter[str] = Counter()

    # ---- the job ------------------------------------------------------------------------------

    def start(self) -> None:
        self.started += 1
        with self.log.open("a") as log:
            self.job = psutil.Popen(
                command(self.args, MOST_STEPS, self.save, self.metrics, "--async-save",
                        "--save-total-limit", 3, "--hang-timeout", HANG_TIMEOUT,
                        "--max-restarts", 10**6),
                stdout=log, stderr=subprocess.STDOUT,
            )

    def ranks(self) -> list[psutil.Process]:
        try:
            return [one for one in self.job.children() if "megatron_vl" in one.cmdline()]
        except GONE:
            return []

    def steps(self) -> list[int]:
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().splitlines()
        return [one["iteration"] for one in map(json.loads, lines) if one["kind"] == "train"]

    def wait_for(self, what, seconds: float = 180.0) -> bool:
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline or self.job.poll() is not None:
                return False
            time.sleep(0.02)
        return True

    def said(self) -> str:
        return self.log.read_text()

    def restarts(self) -> int:
        return self.said().count("starting all processes again")

    def stop(self) -> bool:
        """Ask it to; whether it ended well."""
        self.job.send_signal(self.chance.choice([signal.SIGTERM, signal.SIGUSR1]))
        return self.job.wait(timeout=120) == 0

    def wait_for_steps(self, count: int = 1) -> bool:
        seen = len(self.steps())
        return self.wait_for(lambda: len(self.steps()) >= seen + count)

    # ---- faults -------------------------------------------------------------------------------

    def kill_a_rank(self) -> None:
        kill(self.chance.choice(self.ranks()))

    def kill_every_rank(self) -> None:
        kill(*self.ranks())

    def kill_everything(self) -> None:
        kill(self.job, *self.ranks())
        self.job.wait()
        self.start()

    def kill_during_a_save(self) -> None:
        self.wait_for(lambda: any(self.save.glob(".iter_*.partial")))
        time.sleep(self.chance.uniform(0, 0.5))
        kill(*self.ranks())

    def kill_a_data_worker_or_writer(self) -> None:
        children = [child for rank in self.ranks() for child in rank.children()]
        if children:
            kill(self.chance.choice(children))

    def ask_to_stop(self) -> None:
        if not self.stop():
            raise RuntimeError("it did not end well when it was asked to stop")
        self.start()

    def stop_a_rank_for_a_while(self) -> None:
        rank = self.chance.choice(self.ranks())
        rank.suspend()
        time.sleep(0.5 * HANG_TIMEOUT)
        rank.resume()

    def stop_a_rank_for_good(self) -> None:
        """It hangs, is noticed, and the job ends itself and starts again."""
        rank = self.chance.choice(self.ranks())
        deadline = time.monotonic() + 6 * HANG_TIMEOUT
        with contextlib.suppress(*GONE):
            while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE:
                rank.suspend()
                time.sleep(0.02)
                if time.monotonic() > deadline:
                    raise RuntimeError("a rank that hung was not noticed")

    def damage_the_latest_checkpoint(self) -> None:
        latest = self.save / "latest_checkpointed_iteration.txt"
        if len(list(self.save.glob("iter_*"))) < 2:
            return
        folder = self.save / f"iter_{int(latest.read_text()):07d}"
        file = self.chance.choice([one for one in folder.iterdir() if one.stat().st_size > 1000])
        content = bytearray(file.read_bytes())
        content[self.chance.randrange(len(content))] ^= 1
        file.write_bytes(content)
        kill(*self.ranks())

    FAULTS = (
        kill_a_rank, kill_every_rank, kill_during_a_save, kill_everything,
        kill_a_data_worker_or_writer, ask_to_stop, stop_a_rank_for_a_while, stop_a_rank_for_good,
        damage_the_latest_checkpoint,
    )


def names(kind: Soak | type[Soak]) -> list[str]:
    return [one.__name__ for one in kind.FAULTS]


def kill(*processes: psutil.Process) -> None:
    for one in processes:
        with contextlib.suppress(*GONE):
            one.kill()


def command(
    args: argparse.Namespace, steps: int, save: Path, metrics: Path, *more: object
) -> list[str]:
    words = [
        sys.executable, "-m", "megatron_vl", "train", "--hf-config", args.hf_dir,
        "--train-data-path", args.dataset, "--tensor-model-parallel-size", args.tp,
        "--pipeline-model-parallel-size", args.pp, "--use-distributed-optimizer",
        "--micro-batch-size", 1, "--global-batch-size", 4, "--seq-length", 256,
        "--packing-buffer-size", 64, "--train-iters", steps, "--lr", 1e-3,
        "--lr-decay-style", "constant", "--lr-decay-iters", MOST_STEPS,
        "--eval-interval", 0, "--save", save, "--save-interval", SAVE_INTERVAL,
        "--metrics-file", metrics, *more,
    ]
    return list(map(str, words))


def soak(job: Soak) -> dict:
    """Faults for two thirds of the time, then calm; returns what was seen."""
    args, begun = job.args, time.monotonic()
    end = begun + 60 * args.minutes
    calm = begun + 40 * args.minutes
    job.start()
    faults = iter(())
    while time.monotonic() < calm:
        if not job.wait_for_steps():
            break
        time.sleep(job.chance.uniform(0.2, 2) * args.every / 2)
        fault = next(faults, None)
        if fault is None:
            order = [one for one in job.FAULTS if one.__name__ in (args.faults or names(job))]
            job.chance.shuffle(order)
            faults = iter(order)
            fault = next(faults)
        name = fault.__name__
        print(f"{time.monotonic() - begun:5.0f} s  step {(job.steps() or [0])[-1]:5d}  {name}",
              flush=True)
        with contextlib.suppress(IndexError, *GONE):  # it was being started again
            fault(job)
            job.done[name] += 1
    watched: list[dict[int, tuple[float, int]]] = []
    while time.monotonic() < end and job.wait_for_steps(5):
        with contextlib.suppress(*GONE):
            watched.append({
                int(one.environ()["RANK"]): (one.memory_info().rss / 2**20, one.num_fds())
                for one in job.ranks()
            })
    alive = job.job.poll() is None
    if not alive:
        print(f"it ended by itself with {job.job.returncode}; see {args.out}", flush=True)
    return {"survived": alive and job.stop(), "seconds": time.monotonic() - begun,
            "watched": watched}


def losses(metrics: Path) -> dict[int, float]:
    """Of every step, as it was done last."""
    records = map(json.loads, metrics.read_text().splitlines())
    return {one["iteration"]: one["loss"] for one in records if one["kind"] == "train"}


def report(job: Soak, seen: dict) -> bool:
    """Print the table; whether all is as it should be."""
    steps, said = job.steps(), job.said()
    furthest, again = 0, []
    for before, now in pairwise([0, *steps]):
        if now <= before:
            again.append(furthest - now + 1)
        furthest = max(furthest, now)
    last = losses(job.metrics)
    calm = job.args.out / "calm"
    print(f"the same {furthest} steps without faults", flush=True)
    done = subprocess.run(
        command(job.args, furthest, calm / "save", calm / "metrics.jsonl"),
        capture_output=True, text=True,
    )
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    undisturbed = losses(calm / "metrics.jsonl")
    same = last == {i: undisturbed.get(i) for i in last}
    rows = [
        ("seconds", f"{seen['seconds']:.0f}"), ("steps", f"{furthest:,}"),
        ("faults", f"{job.done.total()}"),
        *((f"  {name}", str(count)) for name, count in job.done.most_common()),
        ("restarts by itself", str(job.restarts())),
        ("times the command was given", str(job.started)),
        ("fell back from a damaged checkpoint", str(said.count("DAMAGED"))),
        ("steps done again, most after one fault", str(max(again, default=0))),
        ("steps done again, in all", f"{sum(again)} ({100 * sum(again) / max(furthest, 1):.1f} %)"),
        ("losses equal to an undisturbed run's, to the bit", "yes" if same else "NO"),
        ("survived", "yes" if seen["survived"] else "NO"),
    ]
    watched = seen["watched"]
    half = len(watched) // 2
    for rank in sorted(watched[0]) if half > 1 else ():
        memory, files = zip(*(one[rank] for one in watched if rank in one), strict=True)
        rows.append((
            f"rank {rank}, over {5 * len(watched)} calm steps",
            f"memory {memory[0]:.0f} MiB at first, then {median(memory[1:half]):.0f}, in the "
            f"second half {median(memory[half:]):.0f}; open files {files[0]} -> {files[-1]}",
        ))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    (job.args.out / "soak.json").write_text(json.dumps(
        {"rows": rows, "watched": watched, "again": again, "seed": job.args.seed}
    ))
    return same and seen["survived"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="prepared dataset")
    parser.add_argument("out", type=Path, metavar="OUT", help="of the runs; made anew")
    parser.add_argument("--minutes", type=float, default=20, help="in all (default: 20)")
    parser.add_argument("--every", type=float, default=40,
                        help="seconds between faults, about (default: 40)")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--hosts", type=int, default=0,
                        help="over so many hosts of namespaces, as root (default: none)")
    parser.add_argument("--faults", nargs="+", metavar="FAULT",
                        help=f"of {', '.join(names(Soak))}, or of soak_hosts.py (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    kind = Soak
    if args.hosts:
        sys.modules["soak"] = sys.modules["__main__"]
        from soak_hosts import HostsSoak as kind
    if unknown := set(args.faults or ()) - set(names(kind)):
        parser.error(f"--faults {', '.join(unknown)}: of {', '.join(names(kind))}")
    job = kind(args)
    seen = soak(job)
    sys.exit(0 if report(job, seen) else 1)


if __name__ == "__main__":
    main()
