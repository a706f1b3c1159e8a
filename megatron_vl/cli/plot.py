"""`megatron-vl plot RUN...`: loss, gradient norm, learning rate and throughput as PNG."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vl.outputs import with_suffix
from megatron_vl.training.reporting.history import names_of, read_history
from megatron_vl.training.reporting.report import plot_runs


def add_parser(commands) -> None:
    parser = commands.add_parser("plot", help="runs as PNG", description=__doc__)
    parser.add_argument("sources", metavar="RUN", nargs="+",
                        help="a run's directory or its metrics.jsonl; several are drawn over "
                        "each other")
    parser.add_argument("--output", help="PNG to write (default: loss.png beside the metrics; of "
                        "several runs, here)")
    parser.add_argument("--title", default="", help="heading of the picture")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    runs = [read_history(source) for source in args.sources]
    beside = runs[0].file.parent if len(runs) == 1 else Path()
    output = beside / "loss.png"
    if args.output is not None:
        output = with_suffix(args.output, (".png",), "--output")
    print(plot_runs(runs, names_of(one.file for one in runs), output, args.title))
    return 0
