"""megatron-vl verify: whether two checkpoints of any kind and layout hold the same tensors.

What a run with an adapter saved is compared as the merged model with a model, and as the adapter
with another adapter.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_vl.cli.convert import check_workers
from megatron_vl.errors import CheckFailed

SHOWN = 20  # tensors a report names


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "verify",
        help="compare two checkpoints of any kind and layout bit by bit",
        description="Compare every tensor of A with B bit by bit, whatever their kinds and "
        "layouts: Hugging Face directories or Megatron-Core checkpoints. Of a run with an adapter "
        "compare the merged model with a model, the adapter with another run's or PEFT's. Exit "
        "code 1 if one differs or is missing.",
    )
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter of PEFT's: compare "
                        "A with it merged")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the model that an adapter in A "
                        "or B is beside (default: where its run found it)")
    parser.add_argument("--dtype-tolerant", action="store_true",
                        help="compare different dtypes after casting to the narrower one")
    parser.add_argument("--hf-config", type=Path, metavar="DIR", help="directory of config.json "
                        "for Megatron-Core checkpoints that have none beside them")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    check_workers(args.workers)
    verify(args.a, args.b, args.hf_config, adapter=args.adapter, base=args.base,
           cast=args.dtype_tolerant, workers=args.workers)
    return 0


def verify(
    a: Path, b: Path, hf_config: Path | None, *, adapter: Path | None = None,
    base: Path | None = None, cast: bool, workers: int,
) -> None:
    """Compare and print a table.

    Raises:
        InputError: one of them cannot be read.
        CheckFailed: they are not equal.
    """
    # Imported here: other commands read this file for their help.
    from megatron_vl.peft.compared import open_both
    from megatron_vl.weights import convert as work
    from megatron_vl.weights.verify import compare

    started = time.perf_counter()
    both = open_both(a, b, hf_config, adapter=adapter, base=base)
    first, second = both.sources
    nbytes = sum(at.nbytes for at in first.tensors.values())
    with work.progress_bar(nbytes, "verify") as progress:
        compared = compare(first, second, both.shapes, tolerant=cast, workers=workers,
                           progress=progress)
    _print(a, b, compared, both.differing, nbytes, time.perf_counter() - started, workers)
    if both.differing or not compared.equal:
        raise CheckFailed(f"{a} and {b} do not hold the same tensors; the table says which.")


def _print(
    a: Path, b: Path, found, settings: dict[str, str], nbytes: int, seconds: float, workers: int
) -> None:
    from megatron_vl.workers import peak_memory

    differing = [one for one in found.tensors if not one.equal]
    rows = [
        *settings.items(),
        *((f"{one.name}", f"{one.differing:,} of {one.numel:,} elements differ, by up to "
           f"{one.largest:.3g}" + _dtypes(one)) for one in differing),
        *((name, f"missing in {path}") for path, names in zip((a, b), found.missing, strict=True)
          for name in names),
        *((str(path), text) for path, texts in zip((a, b), found.inconsistent, strict=True)
          for text in texts),
    ]
    width = max((len(name) for name, _ in rows[:SHOWN]), default=0)
    for name, text in rows[:SHOWN]:
        print(f"{name:<{width}}  {text}")
    if len(rows) > SHOWN:
        print(f"and {len(rows) - SHOWN} more")
    largest = max((one.largest for one in differing), default=0.0)
    peak = peak_memory(workers) / 2**20
    print(f"A = {a}, B = {b}\n{'compared':>8} {'bytes':>16} {'differing':>9} "
          f"{'missing in A':>12} {'missing in B':>12} {'max abs diff':>12} {'GB/s':>6} "
          f"{'peak memory':>12}\n{len(found.tensors):>8} {nbytes:>16,} "
          f"{len(settings) + len(differing):>9} "
          f"{len(found.missing[0]):>12} {len(found.missing[1]):>12} {largest:>12.3g} "
          f"{nbytes / seconds / 10**9:>6.2f} {peak:>8.0f} MiB")


def _dtypes(one) -> str:
    names = [dtype.name for dtype in one.dtypes]
    return "" if names[0] == names[1] else f" ({names[0]} and {names[1]})"
