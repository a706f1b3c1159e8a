"""When every stage of a pipeline ends: Megatron-Core's own schedules, and the planner's simulation.

    python plan_schedule.py [--stages 4]

One process a stage, over gloo; a chunk sleeps as long as it is said to compute, so any number of
stages runs on any number of cores. Told is the median of three runs of each schedule.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings

UNIT = 0.02  # seconds that a stage's whole forward sleeps where nothing is uneven


def cases(p: int) -> dict:
    """name -> microbatches, rows: forwards in UNITs, [kind of microbatch][chunk][stage]."""
    uneven, even, heavy = ([1, 3, 1, 2] * p)[:p], [1] * p, [1] * (p - 1) + [3]
    images = [4, *even[1:]]
    return {
        "even": (2 * p, [[even]]),
        "uneven": (2 * p, [[uneven]]),
        "a slow last stage": (2 * p, [[heavy]]),
        "images in every other microbatch": (2 * p, [[images], [even]]),
        "even, VP2": (2 * p, [[even, even]]),
        "uneven, VP2": (2 * p, [[uneven, even]]),
        "a slow last chunk, VP2": (2 * p, [[even, heavy]]),
        "images in every other microbatch, VP2": (2 * p, [[images, even], [even, even]]),
        "VP3, as many microbatches as stages": (p, [[uneven, even, heavy]]),
    }


def seconds(rows: list, unit: float) -> list:
    return [[[unit * one for one in row] for row in kind] for kind in rows]


def measure(p: int, microbatches: int, rows: list) -> list[float]:
    """Seconds of this rank's schedule."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    from megatron_vl.parallel import Layout
    from megatron_vl.platform import initialize, leave_layout

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = 2 * seconds
            time.sleep(seconds)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(ctx.seconds)
            return gradient.clone(), None

    class Chunk(torch.nn.Module):
        model_type = ModelType.encoder_or_decoder

        def __init__(self, config, chunk: int, stage: int):
            super().__init__()
            self.config, self.vp_stage = config, chunk
            self.first, self.runs, self.received = chunk == stage == 0, 0, None
            self.seconds = [kind[chunk][stage] for kind in seconds(rows, UNIT)]

        def set_input_tensor(self, tensors) -> None:
            self.received = tensors[0] if isinstance(tensors, list) else tensors

        def forward(self):
            x = torch.ones(8, 1, 8, requires_grad=True) if self.first else self.received
            self.runs += 1
            return Sleep.apply(x, self.seconds[(self.runs - 1) % len(self.seconds)])

    def step(_, chunk):
        return chunk(), lambda output: (output.mean(), {})

    v, rank, taken = len(rows[0]), int(os.environ["RANK"]), []
    initialize(Layout(pp=p, vp=v))
    config = TransformerConfig(  # as megatron_vl/models/common/transformer_config.py has it
        num_layers=p * v, hidden_size=8, num_attention_heads=1, pipeline_model_parallel_size=p,
        virtual_pipeline_model_parallel_size=v if v > 1 else None, overlap_p2p_comm=v > 1,
        pipeline_dtype=torch.float32, batch_p2p_comm=v == 1, batch_p2p_sync=False)
    for _ in range(4):
        chunks = [Chunk(config, chunk, rank) for chunk in range(v)]
        torch.distributed.barrier()
        started = time.perf_counter()
        get_forward_backward_func()(
            forward_step_func=step, data_iterator=[None] * v if v > 1 else None,
            model=chunks if v > 1 else chunks[0], num_microbatches=microbatches, seq_length=8,
            micro_batch_size=1, forward_only=False)
        taken.append(time.perf_counter() - started)
    ends = [None] * p
    torch.distributed.all_gather_object(ends, statistics.median(taken[1:]))
    leave_layout()
    return ends


def work() -> None:
    """As one stage."""
    warnings.simplefilter("ignore")
    from megatron_vl.planner.schedule import simulate
    from megatron_vl.platform import select_platform

    select_platform().install()
    p, first = int(os.environ["WORLD_SIZE"]), os.environ["RANK"] == "0"
    told = [] if first else None
    for name, (microbatches, rows) in cases(p).items():
        real = measure(p, microbatches, rows)
        guess = simulate(seconds(rows, UNIT), seconds(rows, 2 * UNIT), microbatches=microbatches,
                         transfer=0).ends
        off = [guess / fact - 1 for guess, fact in zip(guess, real, strict=True)]
        if told is not None:
            told.append(f"| {name} | {max(real):.3f} | {max(guess):.3f} | {min(off):+.1%} to "
                        f"{max(off):+.1%} |")
    if told is not None:
        print("| stages | measured s | simulated s | simulated over measured, of every stage |\n"
              "|---|---|---|---|\n" + "\n".join(told))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=4, help="default: 4")
    args = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        work()
        return 0
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(args.stages), *sys.argv], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
