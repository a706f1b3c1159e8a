"""`megatron-vl lint DATASET`: what is in prepared data, before a GPU waits for it."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from megatron_vl.data.options import TrainedText
from megatron_vl.models.media import MediaLimits
from megatron_vl.training.options.config_sources import add_some_arguments
from megatron_vl.training.options.groups import DataOptions

AS_IN_TRAINING = (
    "max_samples", "max_patches_per_row",
    *(f.name for kind in (MediaLimits, TrainedText) for f in fields(kind)),
)


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "lint",
        help="what is in prepared data: counts, unusable samples, histograms, how rows fill",
        description="Look at samples of a prepared dataset as training would see them. Writes "
        "lint.html, one page with tables, histograms and samples with what of them is trained; "
        "its pictures; and lint.json, its numbers.",
    )
    parser.add_argument(
        "data", metavar="DATASET",
        help="prepared dataset; several as A,B or 0.3,A,0.7,B; or the YAML of a metadataset",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="HF_DIR", type=Path,
        help="model whose tokens and patches are counted; without, neither is",
    )  # fmt: skip
    parser.add_argument(
        "--split", default="train", choices=("train", "val"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=2000, metavar="N",
        help="samples to look at, spread evenly over the shards; 0: all (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seq-length", type=int, default=2048, metavar="N",
        help="tokens of a row, and of the longest sample (default: %(default)s)",
    )  # fmt: skip
    add_some_arguments(parser, DataOptions, AS_IN_TRAINING)
    parser.add_argument(
        "--decode", action="store_true", help="also decode every image and video that is looked at"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path,
        help="the report's directory; a report there is replaced (default: DATASET-lint beside "
        "the dataset, or DATASET-lint-2 and so on where that is there)",
    )  # fmt: skip
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if a sample cannot be used"
    )
    parser.add_argument(
        "--seed", type=int, default=1234, help="of what is drawn (default: %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from megatron_vl.data.lint import LintConfig, lint
    from megatron_vl.data.load.mixture import Mixture
    from megatron_vl.models.registry import family, load_spec
    from megatron_vl.weights.hub import local_model

    if args.model is not None:
        args.model = local_model(args.model, weights=False)
    given = {name: getattr(args, name) for name in AS_IN_TRAINING if hasattr(args, name)}

    def chosen(kind: type):
        return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})

    spec = None if args.model is None else load_spec(args.model)
    if spec is not None and spec.vision is None:
        for name in ("max_patches_per_row", *(f.name for f in fields(MediaLimits))):
            if name in given:
                raise spec.takes_text_alone(name, given[name])
    print(lint(LintConfig(
        data=Mixture.parse(args.data, max_samples=given.get("max_samples")),
        hf_dir=args.model,
        spec=spec,
        family=None if spec is None else family(spec.model_type),
        split=args.split,
        samples=args.samples,
        seq_length=args.seq_length,
        max_patches_per_row=given.get("max_patches_per_row"),
        media=chosen(MediaLimits),
        trained=chosen(TrainedText),
        decode=args.decode,
        output=args.out,
        strict=args.strict,
        seed=args.seed,
        progress=not args.quiet,
    )))
