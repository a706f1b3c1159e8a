"""What the host does in a microbatch of the 2B, and how long: a device that waits for it idles.

    python host.py RESULT.json INPUTS [--model 2b] [--seq-length 4096] [--device cuda]

One process, batches on the device, no reading processes: the host's own time to queue forward and
backward, the device's time for the same, the functions and operators that take the host longest,
and what single calls of a layer cost it. Then the same beside reading processes that are at work.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
import warnings
from pathlib import Path

import torch
from hf_step import read_batches
from results import Results, first_line
from timing import Timer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--model", default="2b")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--options", nargs="*", default=[], help="of train, as key=value")
    return parser.parse_args()


def python_speed() -> float:
    """Milliseconds of a million additions in a loop, the median of five."""
    def loop() -> float:
        started, total = time.perf_counter(), 0
        for number in range(1_000_000):
            total += number
        return 1000 * (time.perf_counter() - started)

    return statistics.median(loop() for _ in range(5))


def build(args):
    """The model as a run has it, and a function that trains one microbatch."""
    from megatron_vl.platform import initialize
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.plan import plan_run
    from megatron_vl.training.setup import build_model, build_optimizer
    from megatron_vl.training.step import run_batches

    more = dict(one.split("=", 1) for one in args.options)
    config = TrainConfig.from_dict({
        "hf_config": str(args.inputs / args.model), "train_data_path": str(args.inputs / "data"),
        "bf16": True, "seq_length": args.seq_length, "use_distributed_optimizer": True, **more,
    })
    plan = plan_run(config, 1)
    platform = initialize(plan.layout)
    model = build_model(plan, platform, initialize_weights=True)
    optimizer, _ = build_optimizer(plan, model, platform)
    device = platform.device(0)

    def microbatch(batch) -> None:
        run_batches(model, [batch], device)

    return model, microbatch, optimizer


def operations(hf_dir: Path) -> int:
    """Of a microbatch, as `megatron-vl plan` counts them."""
    from megatron_vl.models import load_spec
    from megatron_vl.planner.step_time import (
        END_OPERATIONS,
        LANGUAGE_OPERATIONS,
        VISION_OPERATIONS,
    )

    spec = load_spec(hf_dir)
    return (spec.decoder.num_layers * sum(LANGUAGE_OPERATIONS) + sum(END_OPERATIONS)
            + spec.vision.depth * sum(VISION_OPERATIONS))


class Clock:
    """Host and device time of forward and backward, by hooks at the model's ends."""

    def __init__(self, model, timer: Timer):
        self.timer = timer
        self.ends: list[float] = []
        model[0].module.register_forward_pre_hook(lambda *_: self.ends.append(time.perf_counter()))
        model[0].module.register_forward_hook(lambda *_: self.ends.append(time.perf_counter()))

    def run(self, work) -> dict[str, float]:
        """Milliseconds: host forward, host backward, and until the device is done."""
        self.timer.wait()
        self.ends.clear()
        began = time.perf_counter()
        work()
        queued = time.perf_counter()
        self.timer.wait()
        done = time.perf_counter()
        first, second = self.ends
        return dict(host_forward=1000 * (second - first), host_rest=1000 * (queued - second),
                    all_until_done=1000 * (done - began))


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def profile_functions(results: Results, work) -> None:
    """Python's functions by their own time, in the thread that runs forward."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(3):
        work()
    profiler.disable()
    stats = pstats.Stats(profiler).stats
    for (file, line, name), (_, calls, own, total, _) in sorted(
        stats.items(), key=lambda item: -item[1][2]
    )[:30]:
        where = "/".join(Path(file).parts[-3:])
        results.row("Host, Python functions", function=f"{where}:{line} {name}"[:110],
                    calls=calls / 3, own_ms=1000 * own / 3, total_ms=1000 * total / 3,
                    note="of a microbatch; with the profiler's own cost")


def profile_operators(results: Results, work) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    found = profiler.key_averages()
    for one in sorted(found, key=lambda one: -one.self_cpu_time_total)[:30]:
        results.row("Host, operators", operator=one.key[:90], calls=one.count,
                    own_ms=one.self_cpu_time_total / 1000, total_ms=one.cpu_time_total / 1000,
                    note="of a microbatch, forward and backward; with the profiler's own cost")


def single_calls(results: Results, timer: Timer) -> None:
    """Microseconds of the host for one call, 200 in a row on few numbers."""
    import torch.nn.functional as F

    from megatron_vl.ops.attention import BACKENDS, AttentionCase
    from megatron_vl.ops.fusion import choose_kernel, quick_gelu
    from megatron_vl.ops.rotary import Rotary, rotate
    from megatron_vl.ops.segments import Segments

    device = timer.device
    fused = {
        name: choose_kernel(name, True).function for name in ("rotary", "quick_gelu", "swiglu")
    }

    def draw(*shape):
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    q, k, v = draw(256, 12, 128), draw(256, 2, 128), draw(256, 2, 128)
    segments = Segments([100, 156], device=device)
    x, weight, bias = draw(256, 1, 1536), draw(1536), draw(1536)
    rotary = Rotary.of(torch.randn(256, 1, 1, 64, device=device), torch.bfloat16)
    gate = draw(256, 1, 17920)
    calls = {
        "add": lambda: x + x,
        "linear": lambda: F.linear(x, draw_once),
        "rms_norm": lambda: F.rms_norm(x, (1536,), weight, 1e-6),
        "layer_norm": lambda: F.layer_norm(x, (1536,), weight, bias, 1e-6),
        "quick_gelu": lambda: quick_gelu(x),
        "quick_gelu, fused": lambda: fused["quick_gelu"](x),
        "rotate": lambda: rotate(q[:, None], rotary.cos, rotary.sin),
        "rotate, fused": lambda: fused["rotary"](q[:, None], rotary.cos, rotary.sin),
        "SwiGLU, fused": lambda: fused["swiglu"](gate),
        "SwiGLU, Megatron-Core's fused": lambda: swiglu(gate),
    }
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    def swiglu(x):
        return bias_swiglu_impl(x, None)

    draw_once = draw(1536, 1536)
    for name, backend in BACKENDS.items():
        if backend.why_not(AttentionCase.here(dtype=torch.bfloat16, head_dim=128)) is None:
            attend = backend.load(False)
            calls[f"attention, {name}"] = lambda attend=attend: attend(
                q, k, v, segments, causal=True, scale=0.1)
    for name, call in calls.items():
        row = dict(call=name)
        try:
            for _ in range(10):
                out = call()
            torch.autograd.grad(out.sum(), [one for one in (q, x, gate) if one.requires_grad],
                                allow_unused=True)
            timer.wait()
            began = time.perf_counter()
            outs = [call() for _ in range(200)]
            row["forward_us"] = (time.perf_counter() - began) * 1e6 / 200
            timer.wait()
            loss = torch.stack([out.sum() for out in outs]).sum()
            timer.wait()
            began = time.perf_counter()
            torch.autograd.grad(loss, [q, k, v, x, gate], allow_unused=True)
            row["backward_us"] = (time.perf_counter() - began) * 1e6 / 200
        except Exception as problem:  # a row, whatever a kernel raises
            row["error"] = first_line(problem)
        results.row("Host, single calls", **row, note="256 tokens: the host is what is timed")


def main() -> None:
    args = parse_arguments()
    warnings.simplefilter("ignore")
    results, timer = Results(args.result), Timer(args.device)
    results.row("Host", what="a million additions in Python, ms", value=python_speed())
    batches, _ = read_batches(args)
    model, microbatch, _ = build(args)
    clock = Clock(model, timer)
    device = timer.device
    moved = [batch.to(device) for batch in batches]

    def work() -> None:
        microbatch(moved[0])

    for _ in range(3):
        work()
    alone = medians([clock.run(work) for _ in range(6)])
    for name, value in alone.items():
        results.row("Host", what=f"microbatch, {name.replace('_', ' ')}, ms", value=value)
    results.fact(operation_host_us=1000 * (alone["host_forward"] + alone["host_rest"])
                 / operations(args.inputs / args.model))
    profile_functions(results, work)
    profile_operators(results, work)
    single_calls(results, timer)
    beside(args, results, clock, work)


def beside(args, results: Results, clock: Clock, work) -> None:
    """Again while reading processes fill their buffers, as at the start of a run."""
    from megatron_vl.data.load.config import DataConfig
    from megatron_vl.data.load.loader import build_train_loader
    from megatron_vl.models import family, load_spec
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.paths import mixtures

    hf_dir, data = args.inputs / args.model, str(args.inputs / "data")
    train, _ = mixtures(TrainConfig.from_dict({"hf_config": str(hf_dir), "train_data_path": data}))
    spec = load_spec(hf_dir)
    loader = build_train_loader(
        DataConfig(train=train, seq_length=args.seq_length, num_workers=8,
                   packing_buffer_size=100),
        hf_dir=hf_dir, spec=spec, family=family(spec.model_type),
    )
    rows = iter(loader)
    next(rows)
    found = []
    for _ in range(10):
        next(rows)
        found.append(clock.run(work))
    for name, value in medians(found).items():
        results.row("Host", what=f"beside 8 reading processes, {name.replace('_', ' ')}, ms",
                    value=value)
    results.row("Host", what="a million additions in Python beside them, ms",
                value=python_speed())
    loader.close() if hasattr(loader, "close") else None


if __name__ == "__main__":
    main()
