"""Peak memory and time of a training step, by what is recomputed and by the optimizer.

    python memory.py HF_DIR [--seq-length 2048] [--rows 1] [--steps 3] [--threads 1]

HF_DIR needs config.json alone: weights are random, and so are the rows, each as many images of
16 x 16 patches as fit into it, with a little text. Every line is a process of its own that builds
the model and optimizer of `megatron-vl train` and steps; the lines of the optimizer are two
data-parallel ranks, of which the first is measured.

On CUDA both figures are torch's own counts of allocated bytes. On a CPU they are resident memory
(RSS): `held` is what building the model and a first step added, weights, gradients and optimizer
state; `peak` is how far a later step goes above that, activations and what is computed with them.
For the measured step the allocator maps every block above 64 KiB by itself and gives it back at
once, so that RSS follows the tensors; smaller blocks, and what libraries keep, stay in it. The
times are medians of steps before, with the allocator as it is: on a CPU of the processor's time,
which says little of other work on the machine. A line differs by up to a tenth from run to run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import accumulate, islice
from pathlib import Path

GRID = (1, 16, 16)  # of every image: 256 patches, unless the tower takes one grid alone


def full(method: str, layers: int, vision: str = "same") -> dict:
    return dict(recompute_granularity="full", recompute_method=method,
                recompute_num_layers=layers, vit_recompute_granularity=vision)


def recompute_modes(layers: int) -> dict[str, dict]:
    """The options of every line, for a model with so many language layers."""
    half = max(1, layers // 2)
    return {
        "none": {},
        "selective": dict(recompute_granularity="selective"),
        f"full, block {half}, language alone": full("block", half, "none"),
        f"full, block {half}": full("block", half),
        "full, uniform 1, language alone": full("uniform", 1, "none"),
        "full, uniform 1, vision alone": dict(vit_recompute_granularity="full"),
        "full, uniform 1": full("uniform", 1),
        f"full, uniform {half}": full("uniform", half),
    }


OPTIMIZER_MODES = {
    "every rank has all": dict(use_distributed_optimizer=False),
    "distributed over 2 ranks": dict(use_distributed_optimizer=True),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="directory of config.json")
    parser.add_argument("--seq-length", type=int, default=2048, help="of a row (default: 2048)")
    parser.add_argument("--rows", type=int, default=1, help="rows at once (default: 1)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--lines", type=int, help="of each table, the first (default: all)")
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- one process ------------------------------------------------------------------------------


class Meter:
    """Bytes of this process's tensors: torch's count on CUDA, resident memory on a CPU."""

    def __init__(self, cuda: bool):
        self.cuda = cuda

    def settle(self) -> None:
        """Give back what is free, and from now on every larger block as soon as it is."""
        gc.collect()
        if not self.cuda:
            libc = ctypes.CDLL(None)
            m_mmap_threshold, m_trim_threshold = -3, -1  # of <malloc.h>
            libc.mallopt(m_mmap_threshold, 64 * 1024)
            libc.mallopt(m_trim_threshold, 64 * 1024)
            libc.malloc_trim(0)

    def now(self) -> int:
        return self._torch("memory_allocated") if self.cuda else self._status("VmRSS")

    def start(self) -> None:
        """Forget the peak so far."""
        if self.cuda:
            self._torch("reset_peak_memory_stats")
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return self._torch("max_memory_allocated") if self.cuda else self._status("VmHWM")

    @staticmethod
    def _torch(name: str):
        import torch

        return getattr(torch.cuda, name)()

    @staticmethod
    def _status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise ValueError(f"/proc/self/status has no {field}; this benchmark needs Linux.")


def make_batch(spec, seq_length: int, rows: int):
    from megatron_vl.data.encode.rows import make_batch, make_row
    from megatron_vl.models import family
    from megatron_vl.parity.cases import Case, make_samples

    grid = spec.vision.only_grid or GRID
    tokens = spec.vision.num_tokens(grid)
    samples = make_samples(spec, Case(name="one", images=((grid,),) * (seq_length // tokens)))
    ends = accumulate(sample.tokens.numel() for sample in samples)
    row = [sample for sample, end in zip(samples, ends, strict=True) if end <= seq_length]
    if not row:
        raise ValueError(f"--seq-length {seq_length} holds no image of {tokens} tokens; raise it.")
    positions = family(spec.model_type).positions(spec)
    return make_batch([make_row(row)] * rows, row_length=seq_length, pad_token=0,
                      positions=positions)


def measure(args) -> None:
    """Run one line's process, and print its figures if it is the first rank."""
    from megatron_vl.platform import initialize, select_platform

    select_platform().install()
    import torch

    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.plan import plan_run
    from megatron_vl.training.setup import build_model, build_optimizer
    from megatron_vl.training.step import mean_loss, run_batches

    world = int(os.environ.get("WORLD_SIZE", 1))
    config = TrainConfig.from_dict({
        "hf_config": str(args.hf_dir), "train_data_path": str(args.hf_dir), "lr": 1e-4,
        "seq_length": args.seq_length, "micro_batch_size": args.rows,
        "global_batch_size": args.rows * world, "train_iters": 100, **args.options,
    })
    plan = plan_run(config, world)
    platform = initialize(plan.layout)
    meter = Meter(platform.name == "cuda")
    device = platform.device(int(os.environ.get("LOCAL_RANK", 0)))
    batch = make_batch(plan.spec, args.seq_length, args.rows)
    gc.collect()
    before = meter.now()
    model = build_model(plan, platform, initialize_weights=True)
    optimizer, scheduler = build_optimizer(plan, model, platform)

    def step() -> float:
        for chunk in model:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run_batches(model, [batch], device)
        optimizer.step()
        scheduler.step(increment=1)
        platform.synchronize()
        return mean_loss(losses, device)[0]

    clock = time.perf_counter if meter.cuda else time.process_time
    loss, seconds = step(), []
    for _ in range(args.steps):
        started = clock()
        step()
        seconds.append(clock() - started)
    meter.settle()
    step()
    meter.settle()
    level = meter.now()
    meter.start()
    step()
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"held": level - before, "peak": meter.peak() - level,
                          "seconds": statistics.median(seconds), "loss": loss}))


# ---- the tables -------------------------------------------------------------------------------


def run(args, options: dict, ranks: int = 1) -> dict:
    """The figures of a process, or of two, with these options."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(start if ranks > 1 else []), __file__, *sys.argv[1:],
               "--options", json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        if done.returncode:
            errors.seek(0)
            sys.exit(f"{options}: {errors.read()}")
    return json.loads(done.stdout.splitlines()[-1])


def show(title: str, figure: str, modes: dict[str, dict]) -> None:
    base = next(iter(modes.values()))
    print(f"\n| {title} | {figure} MiB | ratio | s/step | ratio |\n|---|---|---|---|---|")
    for name, one in modes.items():
        print(f"| {name} | {one[figure] / 2**20:,.1f} | {one[figure] / base[figure]:.2f} | "
              f"{one['seconds']:.3f} | {one['seconds'] / base['seconds']:.2f} |")


def main() -> None:
    args = parse_arguments()
    if args.options is not None:
        measure(args)
        return
    layers = json.loads((args.hf_dir / "config.json").read_text())
    layers = layers.get("text_config", layers)["num_hidden_layers"]
    recompute = {name: run(args, one)
                 for name, one in islice(recompute_modes(layers).items(), args.lines)}
    optimizer = {name: run(args, one, ranks=2)
                 for name, one in islice(OPTIMIZER_MODES.items(), args.lines)}
    print(f"rows of {args.seq_length} tokens, {args.rows} at once, {args.threads} thread(s); "
          f"{recompute['none']['held'] / 2**20:,.1f} MiB held without a step's activations")
    show("recompute", "peak", recompute)
    show("optimizer state", "held", optimizer)
    first = {one["loss"] for one in recompute.values()}
    print(f"\nfirst losses: {', '.join(f'{loss:.7f}' for loss in sorted(first))}")
    if len(first) > 1:
        sys.exit("recompute changed the loss.")


if __name__ == "__main__":
    main()
