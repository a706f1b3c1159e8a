"""How closely training in bf16 follows fp32: the same start, the same rows, the same schedule.

    python precision.py HF_DIR DATASET OUT [--steps 200] [--lr 1e-3] [--at-most 0.05]

Runs `megatron-vl train` twice on one rank with the quickstart's rows and optimizer, and compares
the losses, each a running mean over 20 steps: the largest and the mean relative difference, and the
means of the last 20 steps. OUT gets the runs and loss.png. With --at-most the exit code is 1 when
the largest difference is larger.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

WINDOW = 20  # steps of a running mean
RUNS = {"fp32": ["--fp32"], "bf16": ["--bf16"]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="prepared dataset")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory of the runs; made anew")
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: 200)")
    parser.add_argument("--lr", type=float, default=1e-3, help="largest (default: 1e-3)")
    parser.add_argument("--seq-length", type=int, default=512, help="of a row (default: 512)")
    parser.add_argument("--at-most", type=float, help="largest relative difference that passes")
    return parser.parse_args()


def megatron_vl(*words: object) -> None:
    command = [sys.executable, "-m", "megatron_vl", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def losses(args, name: str) -> list[float]:
    """The loss of every step of a run."""
    metrics = args.out / name / "metrics.jsonl"
    megatron_vl(
        "train", "--load", args.out / "weights", "--train-data-path", args.dataset,
        "--micro-batch-size", 1, "--global-batch-size", 4, "--seq-length", args.seq_length,
        "--packing-buffer-size", 256, "--train-iters", args.steps, "--lr", args.lr,
        "--min-lr", 0.3 * args.lr, "--lr-warmup-iters", args.steps // 10,
        "--use-distributed-optimizer", "--eval-interval", 0, "--nproc-per-node", 1,
        "--metrics-file", metrics, *RUNS[name],
    )
    records = map(json.loads, metrics.read_text().splitlines())
    losses = [one["loss"] for one in records if one["kind"] == "train"]
    return [math.nan if one is None else one for one in losses]


def smooth(values: list[float]) -> list[float]:
    """Means over WINDOW values, one for every step from the WINDOWth on."""
    return [sum(values[end - WINDOW : end]) / WINDOW for end in range(WINDOW, len(values) + 1)]


def draw(args, curves: dict[str, list[float]], smoothed: dict, apart: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1), layout="constrained"
    )
    steps = range(1, args.steps + 1)
    # The second dashed: they lie on one another.
    styles = (("tab:blue", "-"), ("tab:orange", "--"))
    for (color, style), (name, values) in zip(styles, curves.items(), strict=True):
        above.plot(steps, values, style, color=color, alpha=0.25)
        above.plot(steps[WINDOW - 1 :], smoothed[name], style, color=color, label=name)
    above.set_ylabel("loss of a trained token")
    above.legend(title=f"mean of {WINDOW} steps")
    below.plot(steps[WINDOW - 1 :], [100 * one for one in apart], color="black")
    below.axhline(0, color="gray", linewidth=0.5)
    below.set_ylabel("bf16 - fp32, %")
    below.set_xlabel("step")
    figure.savefig(args.out / "loss.png", dpi=120)


def main() -> int:
    args = parse_arguments()
    if args.steps < WINDOW:
        print(f"--steps {args.steps} is less than a running mean's {WINDOW}.", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=False)
    megatron_vl("convert", args.hf_dir, args.out / "weights", "--dtype", "float32")
    curves = {name: losses(args, name) for name in RUNS}
    smoothed = {name: smooth(values) for name, values in curves.items()}
    apart = [(b - a) / a for a, b in zip(smoothed["fp32"], smoothed["bf16"], strict=True)]
    largest, mean = max(map(abs, apart)), sum(map(abs, apart)) / len(apart)
    draw(args, curves, smoothed, apart)
    print("| | first loss | last loss |\n|---|---|---|")
    for name, values in smoothed.items():
        print(f"| {name} | {curves[name][0]:.4f} | {values[-1]:.4f} |")
    print(f"bf16 is off by at most {100 * largest:.2f} % and by {100 * mean:.2f} % in the mean "
          f"over {args.steps} steps; {args.out / 'loss.png'}")
    if args.at_most is not None and not mean <= largest <= args.at_most:  # NaN is no pass
        print(f"further than --at-most {args.at_most:g}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
