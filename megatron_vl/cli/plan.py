"""`megatron-vl plan HF_DIR --gpus N`: which layout, does it fit, how fast."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_vl.errors import Bounds, InputError
from megatron_vl.models.registry import load_spec
from megatron_vl.outputs import replacing_file, with_suffix
from megatron_vl.training.options.config_sources import add_some_arguments
from megatron_vl.training.options.groups import (
    BatchOptions,
    DataOptions,
    LoraOptions,
    ModelRunOptions,
    OptimizerOptions,
)
from megatron_vl.training.options.option import defaults

OPTIONS = {  # of a run, whatever its layout is
    BatchOptions: ("seq_length", "global_batch_size"),
    DataOptions: ("max_patches_per_row",),
    LoraOptions: ("lora_rank", "lora_target", "quantize_base", "train_vit", "train_merger"),
    ModelRunOptions: ("freeze_vit", "freeze_merger", "freeze_llm"),
    OptimizerOptions: ("grad_reduce_in_bf16",),
}
LEAST_ROWS = 64  # of a step, where nothing says how many
IMAGE_TOKENS = 1024  # of an image, where nothing says how many
MOST = 2**16  # cards


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "plan", help="which layout, does it fit, how fast",
        description="Search every layout of so many cards that the model can be trained in, by its "
        "config.json alone: what fits, by the numbers of train --dry-run, and how fast it would "
        "be. Times are predictions from data sheets, not measurements. docs/planning.md has more.",
    )
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="directory with config.json")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="cards of the run")
    parser.add_argument("--gpu", default="h100-80g", metavar="CARD",
                        help="h200, h100-80g, a100-80g, a100-40g, a800, mi300x, 910b, l40s, 24g, "
                        "16g, or a FILE.json with numbers of your own (default: h100-80g)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N",
                        help="cards of a node (default: 8, or all if they are fewer)")
    parser.add_argument("--image-tokens", type=int, metavar="N",
                        help="tokens of an image, of which rows are full; for times alone "
                        "(default: 1024)")
    parser.add_argument("--trace", action="store_true",
                        help="build ranks of the first layout without memory, and print what they "
                        "take beside what was predicted")
    parser.add_argument("--out", type=Path, metavar="FILE.yaml",
                        help="write the options of the first layout, for train --config")
    for group, names in OPTIONS.items():
        add_some_arguments(parser, group, names)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megatron_vl.planner.advice import nothing_fits
    from megatron_vl.planner.answer import answer, yaml_text
    from megatron_vl.planner.search import search
    from megatron_vl.training.dry_run import aligned
    from megatron_vl.training.trace.rank import check_trace
    from megatron_vl.training.trace.show import trace_rows

    out = None if args.out is None else with_suffix(args.out, (".yaml", ".yml"), "--out")
    question = _question(args)
    if args.trace:  # what no layout could mend, before they are searched
        check_trace(replace(question, gpus=1).plan(), ())
    found = search(question, progress=lambda every: tqdm(
        every, desc="layouts", disable=None, leave=False))
    if not found.best:
        raise nothing_fits(question, found)
    traced = aligned(trace_rows(found.best[0].plan)) if args.trace else ()
    print(answer(question, found))
    if args.trace:
        print("", *traced, sep="\n")
    if out is not None:
        with replacing_file(out) as file:
            file.write_text(yaml_text(question, found.best[0]), encoding="utf-8")
        print(f"\nthe options of the first are in {out}")
    return 0


def _question(args: argparse.Namespace):
    from megatron_vl.planner.cards import read_card
    from megatron_vl.planner.search import Question

    for name in ("gpus", "gpus_per_node", "image_tokens"):
        if getattr(args, name) is not None:
            Bounds(least=1, most=MOST).check(f"--{name.replace('_', '-')}", getattr(args, name))
    spec = load_spec(args.hf_dir)
    if args.image_tokens is not None and spec.vision is None:
        raise spec.takes_text_alone("image_tokens", args.image_tokens)
    if args.image_tokens is not None and (grid := spec.vision.only_grid) is not None:
        raise InputError(
            f"--image-tokens is {args.image_tokens}, but every image of {spec.model_type} has "
            f"{spec.vision.num_tokens(grid)} tokens; leave it out."
        )
    per_node = min(args.gpus_per_node, args.gpus)
    if args.gpus % per_node:
        raise InputError(
            f"--gpus {args.gpus} is not a multiple of the {per_node} cards of a node; give whole "
            f"nodes, or --gpus-per-node."
        )
    options = {name: getattr(args, name) for names in OPTIONS.values() for name in names
               if name in args}
    options.setdefault("seq_length", defaults(BatchOptions)["seq_length"])
    options.setdefault("global_batch_size", -(-LEAST_ROWS // args.gpus) * args.gpus)
    return Question(
        hf_dir=args.hf_dir, gpus=args.gpus, per_node=per_node, card=read_card(args.gpu),
        options=options, image_tokens=args.image_tokens or IMAGE_TOKENS,
    )
