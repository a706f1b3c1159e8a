"""`megatron-vl report RUN`: the page about a run, as training writes it at its end."""

from __future__ import annotations

import argparse

from megatron_vl.outputs import with_suffix
from megatron_vl.training.reporting.page import write_page


def add_parser(commands) -> None:
    parser = commands.add_parser("report", help="a run as a page", description=__doc__)
    parser.add_argument("source", metavar="RUN", help="a run's directory or its metrics.jsonl")
    parser.add_argument("--output", help="page to write (default: report.html beside the metrics)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    output = None
    if args.output is not None:
        output = with_suffix(args.output, (".html", ".htm"), "--output")
    print(write_page(args.source, output))
    return 0
