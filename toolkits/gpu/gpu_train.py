"""`megatron-vl train` at the published sizes, from random weights, on packed rows of images.

    python gpu_train.py RESULT.json NAME INPUTS [--model 2b] [--seq-length 4096] [--rows 8]
        [--steps 8] [--trace] [options of train]

One row: the median step without the first three, tokens of samples (no padding) a second, TFLOP/s
and MFU of what the model needs, against the matrix product that probe.py measured on this card and
against its data sheet; peak memory; how long it took to start.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from results import Results, first_line, read_fact

WARMUP = 3  # steps left out
RECOMPUTE = ["--vit-recompute-granularity", "full"]  # tried where the memory does not suffice
MEMORY = re.compile(r"out of memory|memory of this rank did not suffice")
ERROR = re.compile(rf"[Ee]rror|{MEMORY.pattern}")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("name")
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--model", default="2b")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8, help="of a step, one a microbatch")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--trace", action="store_true", help="trace steps 5 and 6")
    return parser.parse_known_args()


def command(args, options: list[str], scratch: Path) -> list[str]:
    words = [
        sys.executable, "-m", "megatron_vl", "train",
        "--hf-config", args.inputs / args.model, "--train-data-path", args.inputs / "data",
        "--bf16", "--use-distributed-optimizer", "--micro-batch-size", 1,
        "--global-batch-size", args.rows, "--seq-length", args.seq_length,
        "--packing-buffer-size", 100, "--num-workers", args.workers,
        "--train-iters", args.steps, "--lr", 1e-5, "--min-lr", 1e-5,
        "--lr-decay-style", "constant", "--eval-interval", 0,
        "--metrics-file", scratch / "metrics.jsonl", "--log-interval", 1, "--no-report", *options,
    ]
    if args.trace:
        words += ["--profile", "--profile-step-start", 5, "--profile-step-end", 7,
                  "--profile-dir", scratch / "profile"]
    return list(map(str, words))


def knows(option: str) -> bool:
    """Whether `megatron-vl train` has this option."""
    from megatron_vl.training.options.groups import GROUPS

    field = option.removeprefix("--").replace("-", "_")
    return any(field in group.__dataclass_fields__ for group in GROUPS.values())


def read_steps(path: Path) -> list[dict]:
    """The lines of the steps."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [line for line in lines if line["kind"] == "train"]


def summary(steps: list[dict], ceiling: float | None, sheet: float | None) -> dict:
    counted = steps[WARMUP:] or steps[-1:]
    seconds = statistics.median(step["step_seconds"] for step in counted)

    def mean(name: str) -> float:
        return statistics.fmean(step[name] for step in counted)

    tflops = (mean("vision_flops") + mean("llm_flops")) / seconds / 1e12
    # Rows differ from step to step: rates are of the counted steps together.
    together = sum(step["step_seconds"] for step in counted)
    return dict(
        median_step_s=seconds,
        tokens_per_s=sum(step["tokens"] for step in counted) / together,
        TFLOP_per_s=tflops,
        MFU_of_measured=ceiling and tflops / ceiling,
        MFU_of_data_sheet=sheet and tflops / sheet,
        data_wait=mean("data_wait_seconds") / (together / len(counted)),
        peak_memory_GiB=max(step["memory_bytes"] for step in steps) / 2**30,
        tokens_a_step=mean("tokens"), trained_tokens_a_step=mean("trained_tokens"),
        images_a_step=mean("images"), steps=len(steps),
        first_loss=steps[0]["loss"], last_loss=steps[-1]["loss"],
    )


def run(results: Results, args, name: str, options: list[str]) -> tuple[int, str, Path]:
    """One run and its row; its exit code, its last line and where it wrote."""
    scratch = results.path.parent / f"{name}.run"
    words = command(args, options, scratch)
    print(" ".join(words), flush=True)
    started, last = time.time(), ""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
        # The first that names an error: what follows it is often a stack.
        if not ERROR.search(last):
            last = line if line.strip() else last
    code = process.wait()
    row = {"variant": name, "model": args.model, "row_length": args.seq_length,
           "rows_a_step": args.rows, "options": " ".join(options)}
    if steps := read_steps(scratch / "metrics.jsonl"):
        folder = results.path.parent
        row |= summary(steps, read_fact(folder, "probe", "matmul_tflops"),
                       read_fact(folder, "card", "sheet_tflops"))
        row["s_to_first_step"] = steps[0]["time"] - started
        row["steps_s"] = " ".join(f"{step['step_seconds']:.2f}" for step in steps)
    if code:
        row["error"] = first_line(last) or f"exit code {code}"
        results.failed(f"{name}: {row['error']}")
    results.row("Training", **row, note=__doc__.split("\n\n")[2].replace("\n", " ").strip())
    return code, last, scratch


def main() -> int:
    args, options = parse_arguments()
    results = Results(args.result)
    unknown = [word for word in options if word.startswith("--") and not knows(word)]
    if unknown:
        results.row("Training", variant=args.name,
                    error=f"this version of train has no {', '.join(unknown)}")
        return 0
    code, last, scratch = run(results, args, args.name, options)
    if code and MEMORY.search(last) and RECOMPUTE[0] not in options:
        code, _, scratch = run(
            results, args, f"{args.name}, recomputed", [*options, *RECOMPUTE]
        )
    if args.trace:
        from trace_report import read_traces

        read_traces(results, scratch / "profile")
    return min(code, 1)


if __name__ == "__main__":
    sys.exit(main())
