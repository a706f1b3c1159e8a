"""Seconds of a step of two ranks, as `megatron-vl plan` predicts and as measured.

    python plan_time.py OUT [--model text|images] [--rounds 3] [--steps 2] [--seq-length 512]

Every layout runs for real: the model and optimizer of `megatron-vl train` on random rows, in fp32,
over gloo, one thread a rank. Data are in memory, as a plan does not count reading them. A shared
machine's speed changes from minute to minute, so layouts take turns: each round runs all of them,
and what is told of one is the median over rounds of its step over that of DP2 in the same round.

No number of the card is fitted to a layout that is predicted. Products, attention, elementwise
operations and messages are timed by size in every round, on both ranks at once, messages after a
product, so that ranks wait for one another as in a step. The time that Python takes for an
operation is that of a step whose rows are so short that hardly anything else takes time. The card
is left in OUT/MODEL.json, in the form of `megatron-vl plan --gpu`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing.connection
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

from links import rates_by_kind

WIDTHS = ["--num-layers", 8, "--hidden-size", 256, "--num-heads", 4, "--num-kv-heads", 2,
          "--ffn-size", 768, "--dtype", "float32"]
MODELS = {  # of `megatron-vl tiny`
    "text": ["--model-type", "qwen2", *WIDTHS],
    "images": ["--model-type", "qwen2_vl", *WIDTHS, "--vision-depth", 4, "--vision-hidden-size",
               128],
}
GRID = (1, 16, 16)  # patches of every image
PP2 = {"pipeline_model_parallel_size": 2}
REFERENCE, SHORT = "DP2", "DP2, short rows"
LAYOUTS = {  # how long a row is, of --seq-length; options
    REFERENCE: (1, {}),
    "TP2": (1, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (1, PP2),
    "PP2, 6 and 2 layers": (1, PP2 | {"pp_layers": "6,2"}),
    "PP2 VP2": (1, PP2 | {"num_virtual_stages_per_pipeline_rank": 2}),
    "CP2": (1, {"context_parallel_size": 2}),
    "DP2, full recompute": (1, {"recompute_granularity": "full"}),
    "DP2, two long rows at once": (2, {"micro_batch_size": 2}),
    SHORT: (1 / 4, {}),
}
RATES = "rates"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--model", choices=MODELS, default="text", help="default: text")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a round (default: 2)")
    parser.add_argument("--seq-length", type=int, default=512, help="of a row (default: 512)")
    return parser.parse_args()


def plan_of(args: argparse.Namespace, name: str):
    """A step of 4 rows, whatever the layout is."""
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.plan import plan_run

    times, options = LAYOUTS[name]
    directory = str(args.out / args.model)
    return plan_run(TrainConfig.from_dict({
        "hf_config": directory, "train_data_path": directory,
        "seq_length": int(times * args.seq_length), "micro_batch_size": 1, "global_batch_size": 4,
        "fp32": True, "lr": 1e-4, **options,
    }), 2, here=False)


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


def seconds_of(plan, steps: int) -> float:
    """The median step, the slowest rank's, after one that warms up."""
    import torch

    from megatron_vl.platform import initialize
    from megatron_vl.training.setup import build_model, build_optimizer
    from megatron_vl.training.step import run_batches

    platform = initialize(plan.layout, embedding_stage=plan.split.embedding_chunk[0])
    model = build_model(plan, platform, initialize_weights=True)
    optimizer, _ = build_optimizer(plan, model, platform)
    batches, found = [make_batch(plan)] * plan.num_microbatches, []
    for _ in range(steps + 1):
        torch.distributed.barrier()
        started = time.perf_counter()
        for chunk in model:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        run_batches(model, batches, "cpu")
        optimizer.step()
        found.append(time.perf_counter() - started)
    slowest = torch.tensor(found[1:], dtype=torch.float64)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def rate(work: Callable[[], object], size: float) -> float:
    """`size` a second of the median call; as many calls on both ranks."""
    taken = []
    for _ in range(15):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return size / statistics.median(taken)


def rates() -> dict:
    """Products, attention, sums and messages of this machine while both ranks measure."""
    import torch

    from megatron_vl.ops.attention import BACKENDS
    from megatron_vl.ops.segments import Segments
    from megatron_vl.parallel import Layout
    from megatron_vl.platform import initialize

    platform = initialize(Layout(dp=2))
    products, memory, forward, backward = [], [], [], []
    for rows, inner, columns in ((128, 128, 128), (256, 128, 256), (512, 256, 256),
                                 (512, 256, 1024), (1024, 256, 2048)):
        a, b, flops = torch.randn(rows, inner), torch.randn(columns, inner), 2e-9 * (
            rows * inner * columns)
        products.append((flops, rate(partial(torch.nn.functional.linear, a, b), flops) / 1e3))
    for megabytes in (0.1, 0.5, 2, 8, 64):
        a, b = (torch.randn(int(megabytes * 1e6 / 12)) for _ in range(2))
        memory.append((megabytes, rate(partial(torch.add, a, b), megabytes / 1e6)))
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
    a = torch.randn(512, 512)  # whose square takes about as long as what lies between messages
    node = rates_by_kind(torch.distributed.group.WORLD, platform, platform.device(0),
                         (0.004, 0.06, 0.5, 4), before=partial(torch.mm, a, a))
    return {"products": products, "memory": memory, "attention": forward,
            "attention_backward": backward, "node": node}


def of_two_ranks(job: Callable[[], object]) -> object:
    """What rank 0 of two finds, processes that end with the job.

    A model with its optimizer leaves gloo's threads behind, 50 a layout, which slow what follows.
    """
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        answer = job()
        if rank == 0:
            found.put(answer)

    ranks = [context.Process(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for one in ranks:
        one.start()
    multiprocessing.connection.wait([one.sentinel for one in ranks])
    for one in ranks:
        one.join(30)
        if one.exitcode != 0:
            sys.exit("a rank failed, see above; or it waits for one that did")
    return found.get()


def measured(args: argparse.Namespace) -> list[dict]:
    """Of every round the seconds of layouts by name, and the rates."""
    warnings.simplefilter("ignore")
    from megatron_vl.platform import select_platform

    select_platform().install()  # once, for all that are forked
    import torch

    torch.set_num_threads(1)
    plans, rounds = {name: plan_of(args, name) for name in LAYOUTS}, []
    for _ in range(args.rounds):
        found = {name: of_two_ranks(partial(seconds_of, plan, args.steps))
                 for name, plan in plans.items()}
        rounds.append(found | {RATES: of_two_ranks(rates)})
    return rounds


# ---- predicted ---------------------------------------------------------------------------------


def microbatch(plan):
    """The planner's own of `make_batch`."""
    from megatron_vl.planner.microbatch import Microbatch

    batch = make_batch(plan)
    bounds = batch.cu_seqlens.tolist()
    return Microbatch.of(
        plan, lengths=[end - start for start, end in pairwise(bounds) if end > start],
        trained=int(batch.loss_mask.sum()), images=Counter(map(tuple, batch.grid_thw.tolist())))


def predicted(plans: dict, found: dict) -> tuple[dict[str, float], object]:
    """Seconds by layout as a round's rates and its SHORT tell them, and the card."""
    from megatron_vl.planner.cards import Card
    from megatron_vl.planner.rates import LinkRates, Rates
    from megatron_vl.planner.step_time import predict

    of = found[RATES]
    measured = Rates(**of | {"node": LinkRates(**of["node"])})
    card = Card(name="this CPU", memory_gb=1, peak_tflops=max(rate for _, rate in of["products"]),
                memory_tb_s=max(rate for _, rate in of["memory"]), node_gb_s=1, network_gb_s=1,
                host_runs_ahead=False, operation_host_us=1e-3, rates=measured)

    def seconds(name: str, card: Card) -> float:
        plan, batch = plans[name]
        return predict(plan, card, [batch], per_node=2).seconds

    # A step's seconds are linear in the microseconds of an operation.
    without, one = (seconds(SHORT, replace(card, operation_host_us=us)) for us in (1e-3, 1.0))
    card = replace(card, operation_host_us=max(
        1e-3, (found[SHORT] - without) / (one - without)))
    return {name: seconds(name, card) for name in plans}, card


def compare(args: argparse.Namespace, rounds: list[dict]) -> None:
    """Predicts every round by itself, and prints the medians."""
    median = statistics.median
    plans = {name: (plan := plan_of(args, name), microbatch(plan)) for name in LAYOUTS}
    both = [(found, *predicted(plans, found)) for found in rounds]
    found, _, card = sorted(both, key=lambda one: one[0][REFERENCE])[len(both) // 2]
    path = args.out / f"{args.model}.json"
    path.write_text(json.dumps(asdict(card) | {"rates": found[RATES]}, indent=1) + "\n")
    print(f"operation_host_us {', '.join(f'{one[2].operation_host_us:.1f}' for one in both)}\n")
    print("| model | layout | predicted s | measured s | ratio | over DP2, predicted | measured "
          "| ratio | slowest round |\n|---|---|---|---|---|---|---|---|---|")
    times, off, absolute = {}, [], []
    for name in (name for name in LAYOUTS if name != SHORT):
        guess, fact = (median(one[at][name] for one in both) for at in (1, 0))
        ratio = median(one[1][name] / one[0][name] for one in both)
        over = [median(one[at][name] / one[at][REFERENCE] for one in both) for at in (1, 0)]
        slowest = max(one[0][name] for one in both) / min(one[0][name] for one in both) - 1
        print(f"| {args.model} | {name} | {guess:.3f} | {fact:.3f} | {ratio:.2f} | {over[0]:.2f} "
              f"| {over[1]:.2f} | {over[0] / over[1]:.2f} | +{slowest:.0%} |")
        times[name] = over
        absolute.append(abs(ratio - 1))
        off += [] if name == REFERENCE else [abs(over[0] / over[1] - 1)]
    print(f"\n{sum(one <= 0.15 for one in absolute)} of {len(absolute)} steps and "
          f"{sum(one <= 0.15 for one in off)} of {len(off)} steps over DP2 within 15 %")
    orders = [", ".join(sorted(times, key=lambda name: times[name][at])) for at in (1, 0)]
    print(f"fastest first: {orders[0]}\n    predicted: {orders[1]}")


def main() -> None:
    args = parse_arguments()
    directory = args.out / args.model
    if not directory.is_dir():
        subprocess.run([sys.executable, "-m", "megatron_vl", "tiny", *map(str, (
            directory, *MODELS[args.model]))], check=True, stdout=subprocess.DEVNULL)
    rounds = measured(args)
    (args.out / f"{args.model}-measured.json").write_text(json.dumps(rounds, indent=1) + "\n")
    compare(args, rounds)


if __name__ == "__main__":
    main()
