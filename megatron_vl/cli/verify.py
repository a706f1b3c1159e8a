"""megatron-vl verify: whether two checkpoints of any kind and layout hold the same tensors."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from megatron_vl.cli.convert import check_workers
from megatron_vl.errors import CheckFailed, InputError
from megatron_vl.models.registry import family

SHOWN = 20  # tensors a report names


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "verify",
        help="compare two checkpoints of any kind and layout bit by bit",
        description="Compare every tensor of A with B bit by bit, whatever their kinds and "
        "layouts: Hugging Face directories or Megatron-Core checkpoints. Exit code 1 if one "
        "differs or is missing.",
    )
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--dtype-tolerant", action="store_true",
                        help="compare different dtypes after casting to the narrower one")
    parser.add_argument("--hf-config", type=Path, metavar="DIR", help="directory of config.json "
                        "for Megatron-Core checkpoints that have none beside them")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    check_workers(args.workers)
    verify(args.a, args.b, args.hf_config, cast=args.dtype_tolerant, workers=args.workers)
    return 0


def verify(a: Path, b: Path, hf_config: Path | None, *, cast: bool, workers: int) -> None:
    """Compare and print a table.

    Raises:
        InputError: one of them cannot be read.
        CheckFailed: they are not equal.
    """
    # Imported here: other commands read this file for their help.
    from megatron_vl.models.conversion import describe
    from megatron_vl.weights import convert as work
    from megatron_vl.weights.verify import compare

    started = time.perf_counter()
    found = describe(a, hf_config), describe(b, hf_config)
    spec, other = (one.spec for one in found)
    if spec.model_type != other.model_type:
        raise InputError(
            f"{a} holds a {spec.model_type} model but {b} a {other.model_type}; compare "
            f"checkpoints of one model."
        )
    weights = replace(family(spec.model_type).weight_map(spec), partial=True)
    first, second = (work.open_source(one.directory, weights, info=one.info) for one in found)
    nbytes = sum(at.nbytes for at in first.tensors.values())
    with work.progress_bar(nbytes, "verify") as progress:
        compared = compare(first, second, weights, tolerant=cast, workers=workers,
                           progress=progress)
    _print(a, b, compared, nbytes, time.perf_counter() - started, workers)
    if not compared.equal:
        raise CheckFailed(f"{a} and {b} do not hold the same tensors; the table says which.")


def _print(a: Path, b: Path, found, nbytes: int, seconds: float, workers: int) -> None:
    from megatron_vl.workers import peak_memory

    differing = [one for one in found.tensors if not one.equal]
    rows = [
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
          f"{'peak memory':>12}\n{len(found.tensors):>8} {nbytes:>16,} {len(differing):>9} "
          f"{len(found.missing[0]):>12} {len(found.missing[1]):>12} {largest:>12.3g} "
          f"{nbytes / seconds / 10**9:>6.2f} {peak:>8.0f} MiB")


def _dtypes(one) -> str:
    names = [dtype.name for dtype in one.dtypes]
    return "" if names[0] == names[1] else f" ({names[0]} and {names[1]})"
