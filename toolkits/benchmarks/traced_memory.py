"""Activations of ranks of layouts drawn at random, by formula and traced.

    python traced_memory.py HF_DIR [HF_DIR ...] [--draws 16] [--seed 1] [--seq-length S] [--world W]

HF_DIR needs config.json alone. Every draw takes one of them, a layout, what is recomputed and
trained, and a rank, and traces it as `megatron-vl plan --trace` does. What the project refuses is
counted and drawn again. Printed are the options of `megatron-vl train`, GiB of activations,
predicted over traced, and the processor's seconds. The exit code is 1 if a rank is further off than
--tolerance.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

GIB = 2**30
TRIES = 1000  # in a row, of which none is taken


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_dirs", type=Path, nargs="+", metavar="HF_DIR",
                        help="directories of config.json")
    parser.add_argument("--draws", type=int, default=16, help="ranks to trace (default: 16)")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default: 1)")
    parser.add_argument("--seq-length", type=int, nargs="+", default=[1024, 2048, 4096, 8192],
                        help="rows are as long as one of these (default: 1024 to 8192)")
    parser.add_argument("--world", type=int, default=256, help="ranks at most (default: 256)")
    parser.add_argument("--tolerance", type=float, default=0.03,
                        help="relative, of predicted to traced (default: 0.03)")
    return parser.parse_args()


def drawn(args: argparse.Namespace, spec, draw: random.Random) -> tuple[int, dict]:
    """Ranks, and options of train; some of them do not go together, or not with the model."""
    tp, pp = draw.choice([1, 1, 2, 4, 8]), draw.choice([1, 1, 2, 4, 8])
    vp, cp = draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 1, 2])
    ep, dp = draw.choice([1, 1, 1, 2, 4, 8]), draw.choice([1, 2, 16])
    world = tp * pp * cp * max(dp, ep)
    rows = draw.choice([1, 1, 2])
    options = dict(
        seq_length=draw.choice(args.seq_length), micro_batch_size=rows,
        global_batch_size=rows * max(dp, ep) * draw.choice([1, 8, 16]) * pp,
    )

    def some(share: float, *choices: dict) -> tuple[bool, dict]:
        return draw.random() < share, draw.choice(choices)

    for given, more in (
        (tp > 1, dict(tensor_model_parallel_size=tp, sequence_parallel=True)),
        (pp > 1, dict(pipeline_model_parallel_size=pp)),
        (pp > 1 and vp > 1, dict(num_virtual_stages_per_pipeline_rank=vp)),
        (pp > 1 and draw.random() < 0.3, splits(spec, pp, vp, draw)),
        (cp > 1, dict(context_parallel_size=cp)),
        (ep > 1, dict(expert_model_parallel_size=ep)),
        (ep > 1 and draw.random() < 0.5, dict(expert_tensor_parallel_size=1)),
        (tp > 1 and draw.random() < 0.2, dict(vit_data_parallel=True)),
        some(0.3, dict(freeze_vit=True), dict(freeze_merger=True), dict(freeze_llm=True),
             dict(freeze_vit=True, freeze_merger=True), dict(freeze_vit=True, freeze_llm=True)),
        some(0.3, *adapters(draw)),
        some(0.4, *(dict(cross_entropy_chunks=number) for number in (2, 4, 8))),
        some(0.2, *(dict(vit_recompute_granularity=how) for how in ("none", "selective", "full"))),
        some(0.1, dict(fp32=True), dict(fp16=True)),
        some(0.1, dict(max_patches_per_row=4096)),
        some(0.1, dict(packing_buffer_size=0)),
        some(0.1, dict(moe_expert_capacity_factor=1.5)),
        some(0.2, dict(moe_grouped_gemm="off")),
    ):
        options |= more if given else {}
    return world, options | draw.choice([
        {}, {}, dict(recompute_granularity="selective"), dict(recompute_granularity="full"),
        dict(recompute_granularity="full", recompute_num_layers=2),
        dict(recompute_granularity="full", recompute_method="block"),
    ])


def splits(spec, pp: int, vp: int, draw: random.Random) -> dict:
    """Layers of every stage, and chunk by chunk, as uneven as it gets."""
    def parts(layers: int, number: int) -> list[int]:
        cuts = sorted(draw.choices(range(layers + 1), k=number - 1))
        return [stop - start for start, stop in zip([0, *cuts], [*cuts, layers], strict=True)]

    found = dict(pp_layers=parts(spec.decoder.num_layers, pp * vp))
    if spec.vision is not None and draw.random() < 0.5:
        holding = draw.randint(1, pp)  # stages
        found["vit_pp_layers"] = parts(spec.vision.depth, holding) + [0] * (pp * vp - holding)
    return {name: ",".join(map(str, layers)) for name, layers in found.items()}


def adapters(draw: random.Random) -> Iterator[dict]:
    """Some of different kinds."""
    for more in (
        {}, dict(lora_target=["llm", "vit", "merger"]), dict(lora_target=["merger"]),
        dict(lora_target=["linear_qkv", "linear_proj"]), dict(lora_fused=True),
        dict(lora_dropout=0.1), dict(quantize_base="nf4"), dict(train_merger=True),
        dict(train_merger=True, train_vit=True),
    ):
        yield dict(lora_rank=draw.choice([8, 64]), **more)


def typed(value) -> str:
    """As a command line has it."""
    if value is True:
        return ""
    return ",".join(value) if isinstance(value, list) else str(value)


def plan_of(hf_dir: Path, world: int, options: dict):
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.plan import plan_run

    return plan_run(TrainConfig.from_dict({
        "hf_config": str(hf_dir), "train_data_path": str(hf_dir),
        "bf16": not {"fp16", "fp32"} & set(options), "use_distributed_optimizer": True, **options,
    }), world, here=False)


def compare(hf_dir: Path, world: int, options: dict, rank: int) -> tuple[int, int, float]:
    """Predicted and traced bytes, and seconds, in a process of its own."""
    from megatron_vl.training.activations import activation_memory
    from megatron_vl.training.trace.rank import trace_rank

    plan = plan_of(hf_dir, world, options)
    traced = trace_rank(plan, rank)
    return activation_memory(plan, traced.stage).peak, traced.activation_bytes, traced.seconds


def main() -> None:
    from megatron_vl.errors import InputError
    from megatron_vl.models.registry import load_spec

    args = parse_arguments()
    draw, refused, off = random.Random(args.seed), 0, 0
    try:
        specs = {hf_dir: load_spec(hf_dir) for hf_dir in args.hf_dirs}
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print("| model | rank | of | options | traced GiB | ratio | seconds |")
    print("|---|---|---|---|---|---|---|")
    for _ in range(args.draws):
        for _ in range(TRIES):
            hf_dir = draw.choice(args.hf_dirs)
            world, options = drawn(args, specs[hf_dir], draw)
            try:
                if world > args.world:
                    raise InputError(f"{world} ranks")
                plan_of(hf_dir, world, options)
                break
            except InputError:
                refused += 1
        else:
            sys.exit(f"none of {TRIES} layouts fits {', '.join(map(str, args.hf_dirs))}")
        rank = draw.randrange(world)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            predicted, traced, seconds = alone.submit(
                compare, hf_dir, world, options, rank).result()
        ratio = predicted / traced
        off += abs(ratio - 1) > args.tolerance
        words = " ".join(f"--{name.replace('_', '-')} {typed(value)}".rstrip()
                         for name, value in options.items())
        print(f"| {hf_dir.name} | {rank} | {world} | {words} | {traced / GIB:.2f} | {ratio:.3f} "
              f"| {seconds:.0f} |", flush=True)
    print(f"\n{args.draws - off} of {args.draws} ranks within {100 * args.tolerance:g}%; "
          f"{refused} layouts were refused and drawn again")
    sys.exit(off > 0)


if __name__ == "__main__":
    main()
