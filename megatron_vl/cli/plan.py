"""`megatron-vl plan HF_DIR --gpus N`: which layout, does it fit, how fast."""

from __future__ import annotations

import argparse
import re
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path

from megatron_vl.cli.lint import AS_IN_TRAINING
from megatron_vl.errors import Bounds, InputError, shown
from megatron_vl.models.media import MediaLimits
from megatron_vl.models.registry import load_spec
from megatron_vl.outputs import check_writable, replacing_file, with_suffix
from megatron_vl.training.options.bounds import BOUNDS
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
    DataOptions: AS_IN_TRAINING,
    LoraOptions: ("lora_rank", "lora_target", "quantize_base", "train_vit", "train_merger"),
    ModelRunOptions: ("freeze_vit", "freeze_merger", "freeze_llm"),
    OptimizerOptions: ("grad_reduce_in_bf16",),
}
# Of planner.cards, which takes longer to import than to say its names.
CARD_NAMES = ("h200, h100-80g, a100-80g, a100-40g, a800, mi300x, 910b, l40s, 24g, 16g, or a "
              "FILE.json")
LEAST_ROWS = 64  # of a step, where nothing says how many
TEXT_TOKENS = 256  # of a sample beside its images, where nothing says how many
MOST = 2**16  # cards, images of a sample, pixels of a side


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
                        help=f"{CARD_NAMES} with numbers of your own (default: h100-80g)")
    parser.add_argument("--calibrate", type=Path, metavar="FILE.json",
                        help="what was measured on such a card, in place of the shares of its "
                        "data sheet; toolkits/gpu/check.sh writes one")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N",
                        help="cards of a node (default: 8, or all if they are fewer)")
    parser.add_argument("--image-tokens", type=int, metavar="N",
                        help="tokens of an image, of which rows are full; for times alone "
                        "(default: 1024)")
    parser.add_argument("--dataset", metavar="DATASET",
                        help="prepared data whose rows times are predicted for, as "
                        "--train-data-path takes them; a part of their samples is looked at")
    parser.add_argument("--images-per-sample", type=int, metavar="N",
                        help="in place of --dataset: images of every sample")
    parser.add_argument("--image-size", type=_size, metavar="WxH",
                        help="with --images-per-sample: pixels of every image, as 1280x720")
    parser.add_argument("--text-tokens", type=int, metavar="N",
                        help="with --images-per-sample: all other tokens of a sample "
                        "(default: 256)")
    parser.add_argument("--trace", action="store_true",
                        help="build ranks of the first layout without memory, and print what they "
                        "take beside what was predicted")
    parser.add_argument("--out", type=Path, metavar="FILE.yaml",
                        help="write the options of the first layout, for train --config")
    parser.add_argument("--page", type=Path, metavar="FILE.html",
                        help="write one page: the first layout's timeline and memory, the fastest "
                        "ten, and how to run it")
    for group, names in OPTIONS.items():
        add_some_arguments(parser, group, names)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megatron_vl.planner.answer import answer, yaml_text
    from megatron_vl.planner.nothing_fits import nothing_fits
    from megatron_vl.planner.page import page_text
    from megatron_vl.planner.search import search
    from megatron_vl.training.dry_run import aligned
    from megatron_vl.training.trace.rank import check_trace
    from megatron_vl.training.trace.show import trace_rows

    out = None if args.out is None else with_suffix(args.out, (".yaml", ".yml"), "--out")
    page = None if args.page is None else with_suffix(args.page, (".html", ".htm"), "--page")
    for option, path in (("--out", out), ("--page", page)):
        if path is not None:  # before minutes of search
            check_writable(path.absolute().parent, f"{option} {path}")
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
    files = []
    if out is not None:
        files.append((out, yaml_text(question, found.best[0]), "the options of the first are in"))
    if page is not None:
        files.append((page, page_text(question, found), "the page is"))
    with ExitStack() as pending:  # both or none
        for path, text, _ in files:
            pending.enter_context(replacing_file(path)).write_text(text, encoding="utf-8")
    for path, _, words in files:
        print(f"\n{words} {path}")
    return 0


def _question(args: argparse.Namespace):
    from megatron_vl.planner.cards import read_card
    from megatron_vl.planner.microbatch import IMAGE_TOKENS
    from megatron_vl.planner.search import Question

    tokens = BOUNDS["seq_length"]
    for name, bounds in {
        "gpus": Bounds(least=1, most=MOST), "gpus_per_node": Bounds(least=1, most=MOST),
        "image_tokens": tokens, "text_tokens": tokens,
        "images_per_sample": Bounds(least=0, most=MOST),
    }.items():
        if getattr(args, name) is not None:
            bounds.check(_flag(name), getattr(args, name))
    spec = load_spec(args.hf_dir)
    _check_data(args, spec)
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
    question = Question(
        hf_dir=args.hf_dir, gpus=args.gpus, per_node=per_node,
        card=read_card(args.gpu, args.calibrate), options=options,
        image_tokens=args.image_tokens or IMAGE_TOKENS, dataset=args.dataset,
    )
    return replace(question, data=_data(args, question))


def _check_data(args: argparse.Namespace, spec) -> None:
    """Raises InputError: options that say what rows hold, and exclude or need one another."""
    sample = [name for name in ("images_per_sample", "image_size", "text_tokens")
              if getattr(args, name) is not None]
    given = [_flag(name) for name in ("dataset", "image_tokens") if getattr(args, name) is not None]
    given += [_flag(sample[0])] if sample else []
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} both say what rows hold; give one of them.")
    if args.dataset is not None and not args.dataset.strip():
        raise InputError("--dataset is empty; give prepared data, as --train-data-path takes them.")
    if not sample:
        return
    if spec.vision is None and (args.images_per_sample or args.image_size):
        raise spec.takes_text_alone(sample[0], getattr(args, sample[0]))
    if bool(args.images_per_sample) != (args.image_size is not None):
        raise InputError("--images-per-sample and --image-size need one another; give both, or "
                         "--images-per-sample 0 for samples of text.")


def _data(args: argparse.Namespace, question):
    from megatron_vl.planner.microbatch import equal_samples
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.rows import dataset_rows

    if args.dataset is not None:
        return dataset_rows(TrainConfig.from_dict(
            question.options | {"train_data_path": args.dataset, "hf_config": str(args.hf_dir)}))
    if args.images_per_sample is None and args.text_tokens is None:
        return None
    width, height = args.image_size or (0, 0)
    limits = MediaLimits(**{f.name: question.options[f.name] for f in fields(MediaLimits)
                            if f.name in question.options})
    return equal_samples(question.single, limits, images=args.images_per_sample or 0, width=width,
                         height=height, text_tokens=args.text_tokens or TEXT_TOKENS)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _size(text: str) -> tuple[int, int]:
    """Width and height."""
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text, re.ASCII)
    size = tuple(map(int, found.groups())) if found else ()
    if not size or not all(0 < pixels <= MOST for pixels in size):
        raise argparse.ArgumentTypeError(f"{shown(repr(text))} is no size; write 1280x720 pixels")
    return size
