"""`megatron-vl prepare SRC DST`: raw data to shards ready for energon, no questions asked."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from pathlib import Path

from megatron_vl.data.raw.formats import Fields
from megatron_vl.errors import InputError


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "prepare",
        help="raw data -> WebDataset shards ready for energon",
        description="Turn raw data into WebDataset shards, indexed and split by energon. Reads "
        "JSON, JSON lines, parquet and ChatML tar shards. What is refused is listed with its "
        "reason in DST/refused.jsonl.",
    )
    parser.add_argument(
        "source", metavar="SRC", type=Path, help="directory with the raw data, or one file of it"
    )
    parser.add_argument("output", metavar="DST", type=Path, help="the dataset's directory to make")
    parser.add_argument(
        "--format", default="llava", metavar="NAME",
        help="of SRC: llava, sharegpt, chatml, messages, qwen_vl or alpaca (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="NAME", help="the file in SRC, if there are several")
    parser.add_argument(
        "--dataset", metavar="NAME", help="an entry of SRC's dataset_info.json, with its columns"
    )
    parser.add_argument(
        "--columns", metavar="NAME=KEY,..", default="",
        help="where SRC's entries have other keys than its format's, such as images=pictures; "
        "names are those of a dataset_info.json's columns and tags",
    )
    parser.add_argument(
        "--media-root", metavar="DIR", type=Path,
        help="what the media paths are relative to, and within, beside the file's own directory",
    )  # fmt: skip
    parser.add_argument(
        "--marks", default="mend", metavar="HOW",
        help="of entries whose marks and media do not pair off: mend puts media without a mark "
        "before the first question and leaves <image> without an image as text; strict refuses "
        "them (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="HF_DIR", type=Path,
        help="model directory whose tokens --max-length counts",
    )  # fmt: skip
    parser.add_argument(
        "--max-length", metavar="N", type=int, help="refuse samples of more tokens than this"
    )
    parser.add_argument(
        "--split", default="9,1,0", help="shares of train, val and test (default: %(default)s)"
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=10_000, metavar="N",
        help="at most so many samples a shard (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--shuffle", action=argparse.BooleanOptionalAction, default=True,
        help="mix the entries, keeping an image's entries in one split where they fit it; without, "
        "splits are cut in the order of the JSON (default: yes)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=42, help="of the shuffle (default: %(default)s)"
    )
    parser.add_argument(
        "--num-workers", type=int, default=2, metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace DST if it is empty or a prepared dataset"
    )
    parser.add_argument("--strict", action="store_true", help="fail if any entry is refused")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def read_columns(text: str) -> Fields:
    """`images=pictures,role_tag=who` as columns and tags.

    Raises:
        InputError: no such pairs, or an unknown name.
    """
    pairs = dict(word.partition("=")[::2] for word in filter(None, text.split(",")))
    known = [field.name for field in dataclasses.fields(Fields)]
    for name, key in pairs.items():
        if name not in known or not key:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near and name != near[0] else ""
            raise InputError(
                f"--columns {text!r} is not understood at {name!r}{hint}; give NAME=KEY pairs by "
                f"commas, of the names {', '.join(known)}."
            )
    return Fields(**pairs)


def run(args: argparse.Namespace) -> None:
    from megatron_vl.data.raw.prepare import PrepareConfig, prepare

    lengths = None
    if args.tokenizer is not None:
        from megatron_vl.data.raw.lengths import LengthCounter
        from megatron_vl.models.registry import family, load_spec
        from megatron_vl.weights.hub import local_model

        model = local_model(args.tokenizer, weights=False)
        spec = load_spec(model)
        lengths = LengthCounter.from_hf_dir(model, spec, family(spec.model_type))
    summary = prepare(
        PrepareConfig(
            source=args.source,
            output=args.output,
            format=args.format,
            json_name=args.json,
            dataset=args.dataset,
            fields=read_columns(args.columns),
            lengths=lengths,
            max_length=args.max_length,
            media_root=args.media_root,
            marks=args.marks,
            split=args.split,
            samples_per_shard=args.samples_per_shard,
            shuffle=args.shuffle,
            seed=args.seed,
            num_workers=args.num_workers,
            overwrite=args.overwrite,
            strict=args.strict,
            progress=not args.quiet,
        )
    )
    print(summary)
