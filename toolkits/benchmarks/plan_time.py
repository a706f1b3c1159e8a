"""Seconds of a step of one and two ranks, as `megatron-vl plan` predicts and as measured.

    python plan_time.py OUT [--steps 7] [--seq-length 512] [--model text|images]

The CPU is calibrated first, into OUT/cpu.json, in the form of `megatron-vl plan --gpu`: products,
attention and collectives are timed by size, on two ranks at once; the share of the memory's
bandwidth, the time that Python takes for an operation, and how much longer messages take between
ranks that wait for one another are fitted to three real runs. The other layouts are then predicted,
and were run for real: the model and optimizer of `megatron-vl train` on random rows, in fp32, over
gloo, one thread a rank. Told is the median step, the slowest rank's. Data are in memory, as a plan
does not count reading them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, combinations, pairwise, product
from pathlib import Path

WIDTHS = ["--num-layers", 8, "--hidden-size", 256, "--num-heads", 4, "--num-kv-heads", 2,
          "--ffn-size", 768, "--dtype", "float32"]
MODELS = {  # of `megatron-vl tiny`
    "text": ["--model-type", "qwen2", *WIDTHS],
    "images": ["--model-type", "qwen2_vl", *WIDTHS, "--vision-depth", 4, "--vision-hidden-size",
               128],
}
# They calibrate: of two ranks, as these share the machine's memory.
KNOWN = [("text", "DP2"), ("text", "TP2"), ("images", "DP2")]
GRID = (1, 16, 16)  # patches of every image
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {  # ranks, how many times --seq-length a row has, options
    "one rank": (1, 1, {}),
    "DP2": (2, 1, {}),
    "TP2": (2, 1, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, 1, PP2),
    "PP2, 6 and 2 layers": (2, 1, PP2 | {"pp_layers": "6,2"}),
    "PP2 VP2": (2, 1, PP2 | {"num_virtual_stages_per_pipeline_rank": 2}),
    "CP2": (2, 1, {"context_parallel_size": 2}),
    "full recompute": (1, 1, {"recompute_granularity": "full"}),
    "two long rows at once": (1, 2, {"micro_batch_size": 2}),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--steps", type=int, default=7, help="timed steps (default: 7)")
    parser.add_argument("--seq-length", type=int, default=512, help="of a row (default: 512)")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: both")
    parser.add_argument("--jobs", type=json.loads, help=argparse.SUPPRESS)  # of this process
    return parser.parse_args()


def plan_of(args: argparse.Namespace, directory: Path, name: str):
    """A step of 4 rows, whatever the layout is."""
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.plan import plan_run

    ranks, times, options = LAYOUTS[name]
    return plan_run(TrainConfig.from_dict({
        "hf_config": str(directory), "train_data_path": str(directory),
        "seq_length": times * args.seq_length,
        "micro_batch_size": 1, "global_batch_size": 4, "fp32": True, "lr": 1e-4, **options,
    }), ranks, here=False)


# ---- measured ----------------------------------------------------------------------------------


def make_batch(plan):
    """A microbatch whose tokens are all trained: images and a little text, or text alone."""
    from megatron_vl.data.encode.rows import make_batch, make_row
    from megatron_vl.models import family
    from megatron_vl.parity.cases import Case, make_samples

    spec, length = plan.spec, plan.row_length
    images = () if spec.vision is None else (GRID,)
    samples, left = [], length
    for sample in make_samples(spec, Case(name="one", images=(images,) * (length // 8))):
        if sample.tokens.numel() <= left:
            samples.append(sample)
            left -= sample.tokens.numel()
    rows = plan.config.batch.micro_batch_size
    batch = make_batch([make_row(samples)] * rows, row_length=length, pad_token=0,
                       positions=family(spec.model_type).positions(spec))
    return replace(batch, labels=batch.tokens, loss_mask=batch.loss_mask.new_ones(rows, length))


def seconds_of(plan, steps: int) -> list[float]:
    """Seconds of every step on this rank."""
    import torch

    from megatron_vl.platform import initialize, leave_layout
    from megatron_vl.training.setup import build_model, build_optimizer
    from megatron_vl.training.step import run_batches

    platform = initialize(plan.layout, embedding_stage=plan.split.embedding_chunk[0])
    model = build_model(plan, platform, initialize_weights=True)
    optimizer, _ = build_optimizer(plan, model, platform)
    batches, found = [make_batch(plan)] * plan.num_microbatches, []
    for _ in range(steps + 2):
        torch.distributed.barrier()
        started = time.perf_counter()
        for chunk in model:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        run_batches(model, batches, "cpu")
        optimizer.step()
        found.append(time.perf_counter() - started)
    leave_layout()
    return found[2:]


def rates() -> dict:
    """Products, attention and messages of this machine while both ranks measure."""
    import torch

    from megatron_vl.ops.attention import BACKENDS
    from megatron_vl.ops.segments import Segments

    def rate(work, size: float) -> float:
        """`size` a second of the median call; as many calls on both ranks."""
        taken = []
        for _ in range(25):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
        return size / statistics.median(taken)

    products, forward, backward, node = [], [], [], []
    for rows, inner, columns in ((128, 128, 128), (256, 128, 256), (512, 256, 256),
                                 (512, 256, 1024), (1024, 256, 2048)):
        a, b, flops = torch.randn(rows, inner), torch.randn(columns, inner), 2e-9 * (
            rows * inner * columns)
        products.append((flops, rate(partial(torch.nn.functional.linear, a, b), flops) / 1e3))
    attend, heads, width = BACKENDS["sdpa"].load(False), 4, 64
    for length in (64, 256, 512, 1024):
        q, k, v = (torch.randn(length, n, width, requires_grad=True) for n in (heads, 2, 2))
        segments, flops = Segments([length], device="cpu"), 2e-12 * length**2 * heads * width
        call = partial(attend, q, k, v, segments, causal=True, scale=width**-0.5)

        def both(call=call, inputs=(q, k, v)) -> None:
            torch.autograd.grad(call().sum(), inputs)

        alone = rate(call, flops)
        forward.append((length, alone))
        backward.append((length, 2 * flops / (3 * flops / rate(both, 3 * flops) - flops / alone)))
    for megabytes in (0.004, 0.06, 0.5, 4):
        whole = torch.zeros(int(megabytes * 1e6 / 4) * 2)
        part = whole[: whole.numel() // 2].clone()
        node.append((megabytes, rate(
            partial(torch.distributed.all_gather_into_tensor, whole, part), megabytes / 1e3)))
    large = torch.zeros(2**24)
    copied = rate(partial(large.clone().copy_, large), 2 * large.nbytes / 1e12)
    return {"copy": copied, "products": products, "attention": forward,
            "attention_backward": backward, "node": node}


def work(args: argparse.Namespace) -> None:
    """The layouts of one process, by name, of the model in OUT."""
    warnings.simplefilter("ignore")
    from megatron_vl.platform import select_platform

    select_platform().install()
    import torch

    torch.set_num_threads(1)
    ranks, found = int(os.environ.get("WORLD_SIZE", 1)), {}
    for name in args.jobs:
        plan = plan_of(args, args.out, name)
        box = torch.tensor(seconds_of(plan, args.steps), dtype=torch.float64)
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
        found[name] = statistics.median(box.tolist())
    if ranks > 1:
        found["rates"] = rates()
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))


def measured(args: argparse.Namespace, directory: Path) -> dict:
    """The median step of every layout, those of as many ranks in one process a rank."""
    found = {}
    for ranks in (2, 1):
        mine = [name for name, (of, *_) in LAYOUTS.items() if of == ranks]
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [sys.executable, *(start if ranks > 1 else []), __file__, str(directory), "--steps",
             str(args.steps), "--seq-length", str(args.seq_length), "--jobs", json.dumps(mine)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(done.returncode)
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


# ---- predicted ---------------------------------------------------------------------------------


def predicted(args: argparse.Namespace, card, directory: Path, name: str) -> float:
    from megatron_vl.planner.microbatch import Microbatch
    from megatron_vl.planner.step_time import predict

    plan = plan_of(args, directory, name)
    batch = make_batch(plan)
    bounds = batch.cu_seqlens.tolist()
    one = Microbatch.of(
        plan, lengths=[end - start for start, end in pairwise(bounds) if end > start],
        trained=int(batch.loss_mask.sum()), images=Counter(map(tuple, batch.grid_thw.tolist())))
    return predict(plan, card, [one], per_node=2).seconds


def calibrated(args: argparse.Namespace, found: dict[str, dict], directories: dict[str, Path]):
    """The card of which KNOWN takes as long as it did, or as nearly as its two numbers let it."""
    import numpy

    from megatron_vl.planner.cards import Card
    from megatron_vl.planner.rates import Rates

    of = next(one.pop("rates") for one in found.values())
    card = Card(name="this CPU", memory_gb=1, peak_tflops=max(rate for _, rate in of["products"]),
                memory_tb_s=of.pop("copy"), node_gb_s=1, network_gb_s=1, host_runs_ahead=False,
                memory_share=1, operation_host_us=1e-3, rates=Rates(**of))
    known = [(model, name) for model, name in KNOWN if model in found]
    wanted = numpy.array([found[model][name] for model, name in known])

    def steps(**change) -> numpy.ndarray:
        """Of the known runs, as parts of what they took."""
        of = replace(card, **change)
        return numpy.array([predicted(args, of, directories[model], name)
                            for model, name in known]) / wanted

    # A step's seconds are linear in the inverted share, in the microseconds and in the slowness.
    base = steps()
    passes, microseconds, slower = least_squares(numpy.array([
        steps(memory_share=0.5) - base, steps(operation_host_us=1.0) - base,
        steps(rates=slowed(card.rates, 2.0)) - base]).T, 1 - base)
    print(f"messages take {1 + slower:.1f} times as long as one after another")
    return replace(card, memory_share=float(1 / (1 + passes)),
                   operation_host_us=float(max(1e-3, microseconds)),
                   rates=slowed(card.rates, 1 + slower))


def slowed(rates, times: float):
    """Messages between ranks that wait for one another take `times` as long."""
    return replace(rates, node=tuple((size, rate / times) for size, rate in rates.node))


def least_squares(factors, wanted):
    """Numbers, none below zero, with `factors` @ numbers as near `wanted` as it gets."""
    import numpy

    found, columns = [], range(factors.shape[1])
    for used in map(list, chain(*(combinations(columns, n) for n in range(len(columns) + 1)))):
        numbers = numpy.zeros(len(columns))
        numbers[used] = numpy.linalg.lstsq(factors[:, used], wanted, rcond=None)[0]
        if (numbers >= 0).all():
            found.append((float(numpy.linalg.norm(factors @ numbers - wanted)), list(numbers)))
    return min(found)[1]


def written(card, path: Path) -> None:
    """The file that `megatron-vl plan --gpu` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(card), indent=1) + "\n")


def main() -> None:
    args = parse_arguments()
    if args.jobs is not None:
        work(args)
        return
    directories, found = {}, {}
    for model in args.model or MODELS:
        directories[model] = args.out / model
        if not directories[model].is_dir():
            subprocess.run([sys.executable, "-m", "megatron_vl", "tiny", *map(str, (
                directories[model], *MODELS[model]))], check=True, stdout=subprocess.DEVNULL)
        found[model] = measured(args, directories[model])
    (args.out / "measured.json").write_text(json.dumps(found, indent=1) + "\n")
    compare(args, found, directories)


def compare(args: argparse.Namespace, found: dict[str, dict], directories: dict[str, Path]) -> None:
    """Calibrates, predicts and prints."""
    card = calibrated(args, found, directories)
    written(card, args.out / "cpu.json")
    print(f"memory_share {card.memory_share:.2f}, operation_host_us {card.operation_host_us:.1f}")
    print("\n| model | layout | predicted s | measured s | ratio |\n|---|---|---|---|---|")
    off = []
    for model, name in product(found, LAYOUTS):
        if name not in found[model]:
            continue
        guess, fact = predicted(args, card, directories[model], name), found[model][name]
        known = " (calibrates)" * ((model, name) in KNOWN)
        print(f"| {model} | {name}{known} | {guess:.3f} | {fact:.3f} | {guess / fact:.2f} |")
        off += [] if known else [(model, name, guess, fact)]
    worst = max(abs(guess / fact - 1) for *_, guess, fact in off)
    print(f"\nof {len(off)} that were not known, the worst is {worst:.0%} off")
    for model in found:
        mine = [one for one in off if one[0] == model]
        orders = [[name for _, name, *seconds in sorted(mine, key=lambda one: one[at])]
                  for at in (2, 3)]
        print(f"{model}, fastest first: {', '.join(orders[1])}; predicted: "
              f"{'the same' if orders[0] == orders[1] else ', '.join(orders[0])}")


if __name__ == "__main__":
    main()
