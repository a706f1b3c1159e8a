"""`megatron-vl plot RUN`: loss, gradient norm, learning rate and throughput as PNG."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vl.training.report import plot_run


def add_parser(commands) -> None:
    parser = commands.add_parser("plot", help="a run as PNG", description=__doc__)
    parser.add_argument("source", metavar="RUN", help="a run's directory or its metrics.jsonl")
    parser.add_argument("--output", help="PNG to write (default: loss.png beside the metrics)")
    parser.add_argument("--title", default="", help="heading of the picture")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    given = Path(args.source)
    metrics = given / "metrics.jsonl" if given.is_dir() else given
    output = Path(args.output) if args.output else metrics.parent / "loss.png"
    print(plot_run(metrics, output, args.title))
    return 0
