"""`megatron-vl evaluate MODEL DATASET ..`: a model's answers to questions whose answers are known.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from pathlib import Path

from megatron_vl.ask.metrics import METRICS
from megatron_vl.cli.chat import LIMITS, add_model_arguments, asked_directory, load_answerer
from megatron_vl.errors import Bounds, CheckFailed, InputError

_BATCH = Bounds(least=1, most=2**16)


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="score a trained model's answers",
        description="Ask a model every supervised answer of datasets, each with the true turns "
        "before it, greedily, and score what it says. Prints a table; OUTPUT gets every answer, "
        "and a page of the worst. Rerunning the command goes on where it ended.",
    )
    add_model_arguments(parser)
    parser.add_argument("data", type=Path, nargs="+", metavar="DATASET",
                        help="a prepared dataset, the YAML of a metadataset, or raw data as "
                        "prepare reads them")
    parser.add_argument("--split", choices=("train", "val", "test"),
                        help="of prepared datasets (default: val)")
    parser.add_argument("--format", metavar="NAME", help="of raw data: llava, sharegpt, chatml, "
                        "messages, qwen_vl or alpaca (default: llava)")
    parser.add_argument("--json", metavar="NAME",
                        help="the file of raw data in a directory that has several")
    parser.add_argument("--dataset", metavar="NAME", help="an entry of the dataset_info.json in a "
                        "directory of raw data, with its format and columns")
    parser.add_argument("--media-root", type=Path, metavar="DIR", help="what the media paths of "
                        "raw data are relative to, beside the file's own directory")
    parser.add_argument("--group-by", metavar="KEY", help="of raw data: a table by what an entry "
                        "has under KEY, a text or a list of texts, instead of by dataset")
    parser.add_argument("--metric", default="exact", choices=tuple(METRICS), help="exact: to the "
                        "letter; contains: the expected answer stands in the given one; anls: edit "
                        "distance, of DocVQA; relaxed: numbers within 5%%, of ChartQA (default: "
                        "%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N",
                        help="ask about N samples of each dataset, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: 0)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N",
                        help="questions at once (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N",
                        help="of an answer (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="gets answers.jsonl and "
                        "worst.html")
    parser.add_argument("--at-least", metavar="[NAME=]SHARE", help="exit 1 if the score, of the "
                        "table's row NAME or of every row, is lower")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Asks, prints the table, writes OUTPUT.

    Raises:
        InputError: a model, dataset or option that cannot be used.
        CheckFailed: a score is below --at-least.
    """
    from megatron_vl.ask.answerer import Sampling
    from megatron_vl.ask.evaluate import Evaluation
    from megatron_vl.ask.page import write_page
    from megatron_vl.ask.record import PAGE, Record
    from megatron_vl.ask.samples import RawOptions, open_datasets
    from megatron_vl.ask.scores import as_text, refusals, scores
    from megatron_vl.weights.found import weights_mark

    started = time.perf_counter()
    _BATCH.check("--batch-size", args.batch_size)
    least = None if args.at_least is None else _least(args.at_least)
    raw = RawOptions(**{one.name: getattr(args, one.name) for one in fields(RawOptions)})
    datasets = open_datasets(args.data, args.split, raw)
    # Of what answers, not of MODEL: a run that trains saves another checkpoint at any time.
    hf_dir = asked_directory(args)
    record = Record.open(args.output, {
        "model": weights_mark(hf_dir),
        "datasets": {one.name: one.mark for one in datasets}, "metric": args.metric,
        **{name.replace("_", "-"): getattr(args, name, None) for name in (
            "split", "format", "json", "dataset", "group_by", "limit", "seed", "max_new_tokens",
            "thinking", "dtype", *LIMITS,
        )},
    })
    answerer = load_answerer(hf_dir, args)
    answerer.check_thinking(args.thinking)
    answered = Evaluation(
        answerer=answerer, metric=args.metric, thinking=bool(args.thinking), limit=args.limit,
        sampling=Sampling(max_new_tokens=args.max_new_tokens), seed=args.seed,
        batch_size=args.batch_size, progress=not args.quiet,
    ).run(datasets, record)
    found = scores(answered, args.metric, by_group=args.group_by is not None)
    print("\n".join([as_text(found, args.metric), *refusals(answered)]))
    asked = sum(one.refused is None for one in answered)
    print(f"{asked:,} questions answered greedily in {time.perf_counter() - started:.0f} s")
    if args.output is not None:
        write_page(args.output / PAGE, f"answers of {args.model}", found, answered, datasets,
                   metric=args.metric)
        print(args.output / PAGE)
    if not asked:
        raise InputError("no question could be asked; the lines above say why.")
    if least is not None:
        _check(found, *least)


def _least(text: str) -> tuple[str | None, float]:
    """`colour=0.8` as the row and the share."""
    name, _, number = text.rpartition("=")
    try:
        share = float(number)
    except ValueError as error:
        raise InputError(f"--at-least {text!r} is no share; give it as 0.8 or NAME=0.8.") from error
    Bounds(least=0, most=1).check("--at-least", share)
    return name or None, share


def _check(found, name: str | None, share: float) -> None:
    names = [one.name for one in found]
    if name is not None and name not in names:
        raise InputError(f"--at-least names {name!r}, but the table's rows are "
                         f"{', '.join(names)}; give one of them.")
    for one in found:
        if name in (None, one.name) and one.mean < share:
            raise CheckFailed(f"{one.name} scores {one.mean:.3f}, below --at-least {share}.")
