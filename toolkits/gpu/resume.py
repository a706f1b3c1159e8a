"""Tiny runs through `megatron-vl train`: saved and resumed, in every precision, against a CPU.

    python resume.py RESULT.json INPUTS [--device cuda] [--tiny]

- bf16, distributed optimizer, async save, deterministic: half the steps, saved, resumed to the
  end; must equal an uninterrupted run to the bit.
- bf16 without the distributed optimizer: the same.
- fp32 on the device against fp32 on the CPU, loss by loss.
- fp16: the first steps have finite losses, and weights are updated.

All runs are started at once but those that resume. With --tiny the first alone, in fewer steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from device import one_of
from results import Results, first_line

CLOSE = 1e-3  # relative, of fp32 losses on two devices over a few steps of training
FP16_STEPS = 6


class Runs:
    """Starts runs of the tiny model, and reads what they logged."""

    def __init__(self, results: Results, inputs: Path, steps: int):
        self.results, self.inputs, self.steps = results, inputs, steps
        self.scratch = results.path.parent / "resume.run"
        self.scratch.mkdir(parents=True, exist_ok=True)

    def train(self, name: str, *options: object, steps: int | None = None,
              save: str | None = None, cpu: bool = False) -> list[dict]:
        """The logged steps; a run that fails is told and gives none."""
        log = self.scratch / name / "metrics.jsonl"
        words = [
            sys.executable, "-m", "megatron_vl", "train",
            "--hf-config", self.inputs / "tiny", "--train-data-path", self.inputs / "tiny-data",
            "--micro-batch-size", 2, "--global-batch-size", 4, "--seq-length", 512,
            "--packing-buffer-size", 50, "--num-workers", 1, "--lr", 1e-3, "--min-lr", 1e-3,
            "--lr-decay-style", "constant", "--lr-decay-iters", self.steps, "--eval-interval", 0,
            "--train-iters", steps or self.steps, "--metrics-file", log, "--no-report",
            "--max-restarts", 0, "--no-use-distributed-optimizer", *options,
        ]
        if save is not None:
            words += ["--save", self.scratch / f"{save}-checkpoints"]
        environment = dict(os.environ)
        if cpu:
            environment |= one_of("cpu", environment)
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True,
                              env=environment)
        text = f"$ {' '.join(map(str, words))}\n{done.stdout}{done.stderr}"
        print(f"=== {name}: exit code {done.returncode}\n{text}", flush=True)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            self.results.failed(f"run {name}: {first_line(lines[-1] if lines else '')}")
            return []
        steps_seen = [json.loads(line) for line in log.read_text().splitlines()]
        return [step for step in steps_seen if step["kind"] == "train"]

    def weights(self) -> Path:
        """The tiny model's, converted: random ones differ from device to device."""
        target = self.scratch / "weights"
        words = ["convert", self.inputs / "tiny", target, "--dtype", "float32"]
        subprocess.run([sys.executable, "-m", "megatron_vl", *words], check=True)
        return target

    def halves(self, name: str, *options: object) -> list[dict]:
        """Half of the steps, then the rest in another process; all that they logged."""
        first = self.train(f"{name}-first", *options, steps=self.steps // 2, save=name)
        return first and first + self.train(f"{name}-second", *options, save=name)


def compare(results: Results, what: str, found: list[dict], expected: list[dict], limit: float):
    """Loss and gradient norm of every step; further apart than `limit` is a failure."""
    if not found or not expected or len(found) != len(expected):
        results.row("Resuming and precision", check=what, outcome="not comparable",
                    steps=f"{len(found)} and {len(expected)}")
        results.failed(f"{what}: {len(found)} and {len(expected)} steps")
        return
    apart = {
        name: max(abs((a[name] or 0) - (b[name] or 0)) / max(abs(b[name] or 0), 1e-12)
                  for a, b in zip(found, expected, strict=True))
        for name in ("loss", "grad_norm")
    }
    good = apart["loss"] <= limit and (limit or apart["grad_norm"] <= limit)
    results.row(
        "Resuming and precision", check=what, steps=len(found),
        outcome=("equal to the bit" if not any(apart.values()) else "close enough") if good
        else "TOO FAR APART",
        loss_apart=apart["loss"], gradient_norm_apart=apart["grad_norm"],
        first_loss=found[0]["loss"], last_loss=found[-1]["loss"],
        last_expected=expected[-1]["loss"],
    )
    if not good:
        results.failed(f"{what}: losses {apart['loss']:.1e}, gradient norms "
                       f"{apart['grad_norm']:.1e} apart (relative), at most {limit:g} is allowed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    results = Results(args.result)
    results.save()
    runs = Runs(results, args.inputs, steps=4 if args.tiny else 20)
    shared = ("--bf16", "--deterministic")
    sharded = (*shared, "--use-distributed-optimizer", "--async-save")
    with ThreadPoolExecutor(max_workers=8) as pool:
        halves = pool.submit(runs.halves, "sharded", *sharded)
        whole = pool.submit(runs.train, "sharded-whole", *sharded)
        if not args.tiny:
            start = runs.weights()
            plain_halves = pool.submit(runs.halves, "plain", *shared)
            plain = pool.submit(runs.train, "plain-whole", *shared)
            device32 = pool.submit(runs.train, "fp32", "--load", start)
            cpu32 = pool.submit(runs.train, "fp32-cpu", "--load", start, cpu=True)
            half = pool.submit(runs.train, "fp16", "--fp16", "--use-distributed-optimizer",
                               "--initial-loss-scale", 64, steps=FP16_STEPS, save="fp16")
        compare(results, "bf16, distributed optimizer, async save: resumed against whole",
                halves.result(), whole.result(), 0.0)
        if args.tiny:
            return 0
        compare(results, "bf16, plain optimizer: resumed against whole",
                plain_halves.result(), plain.result(), 0.0)
        compare(results, "bf16: plain against distributed optimizer",
                plain.result(), whole.result(), 2e-2)
        compare(results, "fp32: device against CPU", device32.result(), cpu32.result(), CLOSE)
        steps = half.result()
        skipped = sum(step["skipped"] for step in steps)
        good = (len(steps) == FP16_STEPS and skipped < FP16_STEPS
                and all(step["loss"] for step in steps))
        results.row("Resuming and precision", check="fp16: steps, and saved",
                    outcome=f"{skipped} of {len(steps)} skipped by the loss scale",
                    first_loss=steps[0]["loss"] if steps else None,
                    last_loss=steps[-1]["loss"] if steps else None)
        if not good:
            results.failed(f"fp16: {skipped} of {len(steps)} steps were skipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
