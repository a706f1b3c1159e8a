"""Runs the kit's steps, each a process with its own time limit; see README.md beside this file.

What a step found is on disk before the next begins, and the pages are written after each, so that
a run that is cut off still tells what it found. A failed step stops no other. Steps of one group
run beside one another, timing steps alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import report  # noqa: E402  (it needs the package, as do the next)
from device import DEVICES, all_of, one_of  # noqa: E402

from megatron_vl.errors import InputError  # noqa: E402
from megatron_vl.launch.devices import check_devices, variables  # noqa: E402

LARGE = 100.0  # GiB of device memory from which 8k rows of the 2B fit without recomputation
FOR_7B = 130.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process.

    Attributes:
        seconds: about what it takes on an H100 or H200.
        limit: seconds after which it is ended.
        rank: the lower, the more important where --minutes are few.
        group: steps of one group run beside one another.
        all_devices: whether it sees all of them, and not one alone.
        words: its script and arguments, behind the path of its result.
    """

    name: str
    seconds: float
    limit: float
    rank: int
    words: list = field(default_factory=list)
    group: str = ""
    all_devices: bool = False


def steps(args, inputs: Path, memory: float) -> list[Step]:
    """All of them, in order; `memory`: GiB of the device, 0 where it is not known yet."""
    shared = ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    made = [
        Step(name="card", seconds=6, limit=60, rank=0, words=["card.py", "--device", args.device]),
        Step(name="probe", seconds=25, limit=90, rank=1, words=["probe.py", *shared]),
    ]

    def links(seconds: float, limit: float, group: str = "") -> Step:
        return Step(name="links", seconds=seconds, limit=limit, rank=1, group=group,
                    all_devices=True, words=["links.py", *shared])

    if args.tiny:
        small = ["--model", "tiny", "--seq-length", 512, "--rows", 2]
        return [
            *made,
            Step(name="kernels", seconds=10, limit=60, rank=1, words=["kernels.py", *shared],
                 group="small"),
            Step(name="tests", seconds=10, limit=120, rank=1, words=["commands.py", "tests"],
                 group="small"),
            links(10, 60, group="small"),
            Step(name="parity-float32", seconds=20, limit=120, rank=1,
                 words=["commands.py", "parity", inputs], group="small"),
            Step(name="resume", seconds=30, limit=150, rank=1,
                 words=["resume.py", inputs, *shared]),
            Step(name="train-trace", seconds=20, limit=120, rank=1, group="train",
                 words=["gpu_train.py", "tiny, traced", inputs, *small, "--steps", 7, "--workers",
                        1, "--trace"]),
            *(Step(name=f"transformers-{way}", seconds=10, limit=120, rank=1, group="train",
                   words=["hf_step.py", inputs, way, *small, "--steps", 3,
                          "--device", args.device]) for way in ("padded", "packed")),
        ]
    eight = [] if memory >= LARGE else ["--vit-recompute-granularity", "full"]

    def train(name: str, seconds: float, rank: int, *words: object) -> Step:
        return Step(name=f"train-{name}", seconds=seconds, limit=max(120, 2 * seconds), rank=rank,
                    words=["gpu_train.py", name, inputs, *words])

    return [
        *made,
        links(30, 100),
        Step(name="tests", seconds=60, limit=120, rank=1, group="checks",
             words=["commands.py", "tests", "-n", 6]),
        *(Step(name=f"parity-{dtype}", seconds=60, limit=150, rank=1, group="checks",
               words=["commands.py", "parity", inputs, dtype])
          for dtype in ("float32", "bfloat16")),
        Step(name="resume", seconds=90, limit=200, rank=1, group="checks",
             words=["resume.py", inputs, *shared]),
        *(Step(name=f"warm-{number}", seconds=40, limit=90, rank=1, group="checks",
               words=["kernels.py", *shared, "--warm", "--only", names])
          for number, names in enumerate((
              "vision bias + quick_gelu,vision rope,vision LayerNorm",
              "SwiGLU,vision bias + residual,RMSNorm", "cross-entropy,language rope"))),
        Step(name="host", seconds=45, limit=100, rank=2, words=["host.py", inputs]),
        train("2b-4k-unfused", 45, 1, "--fused-ops", "off"),
        train("2b-4k", 50, 1),
        Step(name="kernels", seconds=40, limit=100, rank=2, words=["kernels.py", *shared]),
        train("2b-4k-trace", 60, 2, "--rows", 4, "--steps", 6, "--trace"),
        train("2b-8k", 65, 2, "--seq-length", 8192, *eight),
        *(Step(name=f"transformers-{way}", seconds=35, limit=90, rank=rank,
               words=["hf_step.py", inputs, way]) for way, rank in (("padded", 3), ("packed", 3))),
        *([train("7b-4k", 90, 4, "--model", "7b", "--rows", 2, "--steps", 4,
                 "--recompute-granularity", "full", "--optimizer-cpu-offload",
                 "--optimizer-offload-fraction", 0.5)]
          if memory >= FOR_7B else []),
    ]


def cost(chosen: list[Step]) -> float:
    """Seconds of these steps: those of a group take as long as its longest."""
    longest: dict[str, float] = {}
    for step in chosen:
        key = step.group or step.name
        longest[key] = max(longest.get(key, 0.0), step.seconds)
    return sum(longest.values())


def fitting(all_steps: list[Step], seconds: float | None) -> list[Step]:
    """Those that fit, the most important taken first, in their order."""
    if seconds is None:
        return all_steps
    chosen: list[Step] = []
    for step in sorted(all_steps, key=lambda step: step.rank):
        if cost([*chosen, step]) <= seconds:
            chosen.append(step)
    return [step for step in all_steps if step in chosen]


class Check:
    """A run of the kit: where it writes, and how each step ended."""

    def __init__(self, args, inputs: Path):
        self.args, self.inputs, self.out = args, inputs, args.out
        self.out.mkdir(parents=True, exist_ok=True)
        # Packed, OUT holds a handful of files at every moment.
        self.work = Path(tempfile.mkdtemp(prefix="gpu-check-")) if args.pack else self.out
        self.results, self.logs = self.work / "steps", self.work / "logs"
        for folder in (self.results, self.logs):
            folder.mkdir(exist_ok=True)
        self.began = time.monotonic()
        self.writing = threading.Lock()
        self.status: dict[str, dict] = {}

    def left(self) -> float | None:
        if self.args.minutes is None:
            return None
        return 60 * self.args.minutes - (time.monotonic() - self.began)

    def plan(self, memory: float) -> list[Step]:
        found = steps(self.args, self.inputs, memory)
        if self.args.only:
            wanted = self.args.only.split(",")
            unknown = [one for one in wanted if not any(s.name.startswith(one) for s in found)]
            if unknown:
                sys.exit(f"check.sh: no step {', '.join(unknown)}; there are "
                         f"{', '.join(step.name for step in found)}.")
            names = {step.name for step in found}  # a whole name is that step alone
            found = [step for step in found if step.name in wanted
                     or step.name.startswith(tuple(one for one in wanted if one not in names))]
        return found

    def run(self) -> int:
        card, *_ = steps(self.args, self.inputs, 0.0)
        self.run_group([card])
        memory = (report.gather(self.results, ["card"])[2].get("card") or {}).get("memory_gib", 0)
        planned = [step for step in self.plan(memory) if step.name != "card"]
        for step in planned:
            self.status[step.name] = {"step": step.name, "outcome": "waiting"}
        done: set[str] = set()
        while waiting := [step for step in planned if step.name not in done]:
            chosen = fitting(waiting, self.left())
            for step in waiting:
                if step not in chosen:
                    done.add(step.name)
                    self.status[step.name]["outcome"] = (
                        f"left out: {step.seconds:.0f} s are not left"
                    )
            if not chosen:
                break
            group = [step for step in chosen
                     if step is chosen[0] or (step.group and step.group == chosen[0].group)]
            self.run_group(group)
            done |= {step.name for step in group}
        self.render()
        for one in self.status.values():
            print(f"{one['step']:<22} {one.get('seconds', 0):>7.1f} s  {one['outcome']}")
        failed = report.gather(self.results, list(self.status))[1]
        print("\n".join(f"failed: {sentence}" for sentence in failed) or "nothing failed")
        return 1 if failed or any(
            one["outcome"] != "ok" and not one["outcome"].startswith("left out")
            for one in self.status.values()
        ) else 0

    def run_group(self, group: list[Step]) -> None:
        for step in group:
            self.status[step.name] = {"step": step.name, "outcome": "running"}
        with ThreadPoolExecutor(max_workers=len(group)) as pool:
            list(pool.map(self.run_step, group))
        self.render()

    def run_step(self, step: Step) -> None:
        script, *words = map(str, step.words)
        command = [sys.executable, "-W", "ignore", HERE / script,
                   self.results / f"{step.name}.json", *words]
        limit = step.limit if self.left() is None else min(step.limit, max(20, self.left() + 15))
        began = time.monotonic()
        print(f"[{began - self.began:6.1f} s] {step.name}", flush=True)
        environment = dict(os.environ)
        if not step.all_devices:
            environment |= one_of(self.args.device, os.environ)
        if step.group:
            environment["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", "2")
        with open(self.logs / f"{step.name}.log", "wb") as log:
            process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, cwd=self.work, env=environment,
            )
            try:
                code = process.wait(limit)
                outcome = "ok" if code == 0 else f"failed with exit code {code}"
            except subprocess.TimeoutExpired:
                end(process)
                outcome = f"ended after its limit of {limit:.0f} s"
        self.status[step.name] |= {
            "outcome": outcome, "seconds": round(time.monotonic() - began, 1),
            "estimate s": step.seconds, "began at s": round(began - self.began, 1),
        }
        print(f"[{time.monotonic() - self.began:6.1f} s] {step.name}: {outcome}", flush=True)
        self.render()

    def render(self) -> None:
        with self.writing:
            self._render()

    def _render(self) -> None:
        rows = list(self.status.values())
        order = [row["step"] for row in rows]
        try:
            report.render(self.out, self.results, order, rows)
            merged = {"steps": rows, "results": {
                name: json.loads((self.results / f"{name}.json").read_text())
                for name in order if (self.results / f"{name}.json").exists()
            }}
            (self.out / "results.json").write_text(json.dumps(merged, indent=1))
            if card := calibration(merged["results"]):
                (self.out / "gpu.json").write_text(json.dumps(card, indent=1) + "\n")
            if self.args.pack:
                self.pack()
        except Exception as error:  # the pages are made again after the next step
            print(f"the pages could not be written: {error}", flush=True)

    def pack(self) -> None:
        """Logs and metrics as one file, and the trace."""
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as tar:
            tar.add(self.logs, "logs")
            for path in sorted(self.results.rglob("*.jsonl")):
                tar.add(path, path.relative_to(self.work))
        if (trace := self.results / "trace.json.gz").exists():
            shutil.copyfile(trace, self.out / "trace.json.gz")


def calibration(results: dict[str, dict]) -> dict:
    """What the steps measured of the card, as `megatron-vl plan --calibrate` reads it."""
    facts = {name: found["facts"] for name, found in results.items()}
    rates = {kind: points for step in ("probe", "links")
             for kind, points in facts.get(step, {}).get("rates", {}).items()}
    host = {name: value for name, value in facts.get("host", {}).items()
            if name == "operation_host_us"}
    return host | ({"rates": rates} if rates else {})


def end(process: subprocess.Popen) -> None:
    """End a step with all that it started, also what has a session of its own."""
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for send in (signal.SIGTERM, signal.SIGKILL):
        for one in (process, *family):
            try:
                os.kill(one.pid, send)
            except ProcessLookupError:
                continue
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            continue
        if send == signal.SIGTERM:
            time.sleep(1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the tiny model alone")
    parser.add_argument("--only", help="steps that begin so, between commas")
    parser.add_argument("--minutes", type=float, help="leave out what does not fit")
    parser.add_argument("--inputs", type=Path, help="of inputs.py; made in OUT where not given")
    parser.add_argument("--pack", action="store_true", help="leave few files in OUT")
    args = parser.parse_args()
    args.out = args.out.resolve()
    os.environ.update(all_of(args.device))
    os.environ.update(variables())
    try:
        check_devices()
    except InputError as error:
        parser.exit(2, f"check.sh: {error}\n")
    inputs = args.inputs.resolve() if args.inputs else args.out / "inputs"
    if not inputs.is_dir():
        made = [sys.executable, "-W", "ignore", HERE / "inputs.py", inputs]
        subprocess.run([*made, *(["--tiny"] if args.tiny else [])], check=True)
    return Check(args, inputs).run()


if __name__ == "__main__":
    sys.exit(main())
