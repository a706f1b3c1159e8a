"""Seconds of a step of two ranks, as `megatron-vl plan` predicts and as measured.

    python plan_time.py OUT [--model text|images] [--rounds 4] [--steps 3] [--seq-length 512]

Every layout runs for real: the model and optimizer of `megatron-vl train` on random rows, in fp32,
over gloo, one thread a rank. Data are in memory, as a plan does not count reading them. A shared
machine is at times slower than it is alone, never faster: layouts take turns, each round runs all
of them, and the best round counts, of steps and of rates.

Three layouts calibrate: of one with short rows most of a step is Python, of one with two long rows
computation, of TP2 messages. Products, attention, elementwise operations and messages are timed by
size in every round, on both ranks at once, messages after a product, so that ranks wait for one
another as in a step. The three steps tell how much longer computation takes there than alone, how
much longer messages, and how long Python takes for an operation. The card is left in
OUT/MODEL.json, in the form of `megatron-vl plan --gpu`.
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
PP2, FULL = {"pipeline_model_parallel_size": 2}, {"recompute_granularity": "full"}
CALIBRATING = {  # how long a row is, of --seq-length; options
    "DP2, short rows": (1 / 4, {}),
    "DP2, two long rows at once": (2, {"micro_batch_size": 2}),
    "TP2": (1, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}
PREDICTED = {
    "DP2": (1, {}),
    "DP2, full recompute": (1, FULL),
    "PP2": (1, PP2),
    "PP2, 6 and 2 layers": (1, PP2 | {"pp_layers": "6,2"}),
    "PP2 VP2": (1, PP2 | {"num_virtual_stages_per_pipeline_rank": 2}),
    "PP2, full recompute": (1, PP2 | FULL),
    "CP2": (1, {"context_parallel_size": 2}),
}
LAYOUTS = CALIBRATING | PREDICTED
RATES = "rates"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--model", choices=MODELS, default="text", help="default: text")
    parser.add_argument("--rounds", type=int, default=4, help="default: 4")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round (default: 3)")
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


def best(rounds: list, of: Callable = max) -> object:
    """One of what all rounds found: of every number the largest, in whatever lists it lies."""
    first = rounds[0]
    if isinstance(first, dict):
        return {name: best([one[name] for one in rounds], of) for name in first}
    if isinstance(first, list | tuple):
        return [best(list(one), of) for one in zip(*rounds, strict=True)]
    return of(rounds)


def card_of(rates: dict, us: float, computation: float, messages: float):
    """A card whose operations take `us` of Python, and the measured ones so many times as long."""
    from megatron_vl.planner.cards import Card
    from megatron_vl.planner.rates import LinkRates, Rates

    def slower(points, times):
        return [(size, rate / times) for size, rate in points]

    measured = {name: slower(points, computation) for name, points in rates.items()
                if name != "node"}
    node = {kind: slower(points, messages) for kind, points in rates["node"].items()}
    return Card(name="this CPU", memory_gb=1, peak_tflops=max(rate for _, rate in
                                                              measured["products"]),
                memory_tb_s=max(rate for _, rate in measured["memory"]), node_gb_s=1,
                network_gb_s=1, host_runs_ahead=False, operation_host_us=us,
                rates=Rates(**measured, node=LinkRates(**node)))


def compare(args: argparse.Namespace, rounds: list[dict]) -> None:
    """Calibrates by three layouts, predicts the others, and prints both."""
    import numpy

    from megatron_vl.planner.step_time import predict

    plans = {name: (plan := plan_of(args, name), microbatch(plan)) for name in LAYOUTS}
    found = best(rounds, min) | {RATES: best([one[RATES] for one in rounds])}

    def seconds(name: str, *factors: float) -> float:
        plan, batch = plans[name]
        return predict(plan, card_of(found[RATES], *factors), [batch], per_node=2).seconds

    # The steps that calibrate run nothing side by side: their seconds are linear in the factors.
    none = 1e-6
    alone = [[seconds(name, *row) for row in numpy.eye(3).clip(none)] for name in CALIBRATING]
    factors = numpy.linalg.solve(alone, [found[name] for name in CALIBRATING]).clip(none).tolist()
    path = args.out / f"{args.model}.json"
    card = asdict(card_of(found[RATES], *factors))
    del card["rates"]["network"]  # which has no points
    path.write_text(json.dumps(card, indent=1) + "\n")
    print("An operation takes {:.0f} us of Python; computation takes {:.2f}, messages {:.2f} times "
          "as long as alone.\n".format(*factors))
    print("| model | layout | predicted s | measured s | ratio | slowest round |\n"
          "|---|---|---|---|---|---|")
    guesses = {name: seconds(name, *factors) for name in LAYOUTS}
    for name, guess in guesses.items():
        spread = max(one[name] for one in rounds) / min(one[name] for one in rounds) - 1
        ratio = "calibrates" if name in CALIBRATING else f"{guess / found[name]:.2f}"
        print(f"| {args.model} | {name} | {guess:.3f} | {found[name]:.3f} | {ratio} "
              f"| +{spread:.0%} |")
    near = sum(abs(guesses[name] / found[name] - 1) <= 0.15 for name in PREDICTED)
    print(f"\n{near} of {len(PREDICTED)} steps within 15 %")
    for what, times in (("fastest first", found), ("    predicted", guesses)):
        print(f"{what}: {', '.join(sorted(PREDICTED, key=times.__getitem__))}")


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
