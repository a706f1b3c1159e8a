"""Ceilings of this card, then every attention backend that runs here, timed and checked.

    python probe.py RESULT.json [--device cuda] [--tiny]

The ceilings come first, for every rate after them is told as a part of them: a bf16 matrix product
of 8192^3 and a copy on the device. Then each row of `megatron_vl.ops.attention.BACKENDS`, forward
and forward with backward, at the shapes of the 2B and 7B models. FLOPs are those that the segments
need: 4 L^2 N H a segment forward, half of it causal, and 2.5 times that backward.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path

import torch
from results import Results, first_line
from timing import Timer, relative_error

from megatron_vl.ops.attention import BACKENDS, AttentionCase
from megatron_vl.ops.segments import Segments


def uneven(total: int, parts: int, multiple: int = 1) -> list[int]:
    """Lengths of `parts` segments that sum to `total`, the same at every call."""
    draw = random.Random(parts)
    weights = [draw.uniform(0.4, 1.6) for _ in range(parts)]
    lengths = [max(multiple, int(total * one / sum(weights)) // multiple * multiple)
               for one in weights]
    lengths[0] += total - sum(lengths)
    return lengths


def shapes(tiny: bool) -> list[tuple]:
    """(name, lengths, N, G, H, causal)."""
    if tiny:
        return [("language", [64, 64], 4, 2, 32, True),
                ("vision", uneven(96, 3, 4), 2, 2, 20, False)]
    language = {"2 x 4096": [4096] * 2, "1 x 8192": [8192], "40 uneven": uneven(8192, 40)}
    vision = {"24 x 1024": [1024] * 24, "24 uneven": uneven(24576, 24, 4)}
    rows = [(f"2B language, {name}", lengths, 12, 2, 128, True)
            for name, lengths in language.items()]
    rows += [(f"vision, {name}", lengths, 16, 16, 80, False) for name, lengths in vision.items()]
    rows += [(f"7B language, {name}", language[name], 28, 4, 128, True)
             for name in ("2 x 4096", "40 uneven")]
    return rows


def measure_ceilings(results: Results, timer: Timer, tiny: bool) -> None:
    device, size = timer.device, 256 if tiny else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    ms = timer.median([lambda: torch.mm(a, b, out=out)])
    flops = 2 * size**3 / ms / 1e9
    source = torch.randn((1 << 20) if tiny else (1 << 30), device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_ms = timer.median([lambda: target.copy_(source)])
    copied = 2 * source.nbytes / copy_ms / 1e9
    small = torch.zeros(1, device=device)
    launch_ms = timer.median([lambda: [small.add_(1) for _ in range(100)]]) / 100
    results.fact(matmul_tflops=flops, copy_tbps=copied, rates={
        "products": products_by_size(timer, tiny), "memory": additions_by_size(timer, tiny)})
    results.row("Measured ceilings", what=f"bf16 matrix product, {size}^3", ms=ms,
                rate=f"{flops:.1f} TFLOP/s")
    results.row("Measured ceilings", what=f"copy of {source.nbytes / 2**30:.2f} GiB, read + write",
                ms=copy_ms, rate=f"{copied:.3f} TB/s")
    results.row("Measured ceilings", what="one small kernel, launched in a row of 100",
                ms=launch_ms, rate="")


def products_by_size(timer: Timer, tiny: bool) -> list[tuple[float, float]]:
    """(10^9 FLOPs, 10^12 FLOPs a second) of bf16 products of one side each."""
    found = []
    for side in (64, 128) if tiny else (512, 1024, 2048, 4096, 8192):
        a, b = (torch.randn(side, side, device=timer.device, dtype=torch.bfloat16)
                for _ in range(2))
        gflops = 2 * side**3 / 1e9
        found.append((gflops, gflops / timer.median([partial(torch.mm, a, b)])))
    return found


def additions_by_size(timer: Timer, tiny: bool) -> list[tuple[float, float]]:
    """(10^6 bytes read and written, 10^12 bytes a second) of sums of two bf16 tensors."""
    found = []
    for megabytes in (0.1, 1) if tiny else (1, 10, 100, 1000):
        a, b = (torch.randn(int(megabytes * 1e6 / 6), device=timer.device, dtype=torch.bfloat16)
                for _ in range(2))
        found.append((megabytes, megabytes / 1e3 / timer.median([partial(torch.add, a, b)])))
    return found


def attention_by_length(found: dict[int, list[tuple[float, float]]]) -> dict[str, list]:
    """Rates forward and backward of the backend that is fastest at a length, as `--calibrate`
    reads them."""
    best = {length: max(rates, key=lambda one: 1 / (1 / one[0] + 2 / one[1]))
            for length, rates in sorted(found.items()) if rates}
    return {name: [(length, one[at]) for length, one in best.items()]
            for at, name in enumerate(("attention", "attention_backward"))} if best else {}


def cudnn_attention(q, k, v, segments, *, causal, scale):
    """torch's cuDNN attention over segments of one length; [T, N, H]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows, width = len(segments.lengths), segments.lengths[0]
    if set(segments.lengths) != {width}:
        raise ValueError("segments are not equally long")
    q, k, v = (x.view(rows, width, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2).reshape(rows * width, -1, v.shape[-1])


def candidates(case: AttentionCase, lengths: list[int]) -> dict:
    """name -> function that loads it, of what runs here."""
    found = {
        name: partial(backend.load, False) for name, backend in BACKENDS.items()
        if backend.why_not(case) is None
    }
    if case.cuda and len(set(lengths)) == 1:
        found["torch cuDNN, equal segments"] = lambda: cudnn_attention
    return found


def measure_attention(
    results: Results, timer: Timer, shape: tuple
) -> list[tuple[float, float]]:
    """A row a backend; 10^12 FLOPs a second, forward and backward, of those of the project."""
    found_rates = []
    name, lengths, heads, groups, width, causal = shape
    device, tokens, scale = timer.device, sum(lengths), width**-0.5
    dtype = torch.bfloat16
    torch.manual_seed(0)

    def inputs():
        q, k, v = (torch.randn(tokens, n, width, device=device, dtype=dtype, requires_grad=True)
                   for n in (heads, groups, groups))
        return q, k, v, torch.randn(tokens, heads, width, device=device, dtype=dtype)

    sets = [inputs() for _ in range(2)]
    segments = Segments(lengths, device=device)
    flops = sum(4 * n * n * heads * width for n in lengths) * (0.5 if causal else 1.0)
    case = AttentionCase.here(dtype=dtype, head_dim=width)

    def outputs(attend, q, k, v, weights):
        out = attend(q, k, v, segments, causal=causal, scale=scale)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), weights)

    expected = outputs(BACKENDS["sdpa"].load(False), *sets[0])
    for backend, load in candidates(case, lengths).items():
        row = dict(shape=name, backend=backend)
        try:
            attend = load()
            found = outputs(attend, *sets[0])
            error = max(map(relative_error, found, expected))
            forward = timer.median([
                partial(attend, *s[:3], segments, causal=causal, scale=scale) for s in sets
            ])
            both = timer.median([partial(outputs, attend, *s) for s in sets])
        except Exception as problem:  # a row, whatever a kernel raises
            results.row("Attention", **row, error=first_line(problem))
            results.failed(f"attention {backend}, {name}: {first_line(problem)}")
            continue
        results.row(
            "Attention", **row, forward_ms=forward, forward_TFLOP_per_s=flops / forward / 1e9,
            both_ms=both, both_TFLOP_per_s=3.5 * flops / both / 1e9, off_from_sdpa=error,
            note="bf16; both: forward with backward; off from sdpa: largest relative difference of "
            "the output and the three gradients",
        )
        if not error < 3e-2:
            results.failed(f"attention {backend}, {name}: {error:.1e} off from sdpa")
        elif backend in BACKENDS and both > forward:
            found_rates.append((flops / forward / 1e9, 2 * flops / (both - forward) / 1e9))
    return found_rates


def measure_backends(results: Results, tiny: bool) -> None:
    for name, backend in BACKENDS.items():
        case = AttentionCase.here(dtype=torch.bfloat16, head_dim=32 if tiny else 128)
        reason = backend.why_not(case)
        results.row("Attention backends", backend=name, runs_here=reason or "yes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    results, timer = Results(args.result), Timer(args.device, 0.01 if args.tiny else 0.15)
    measure_ceilings(results, timer, args.tiny)
    measure_backends(results, args.tiny)
    found: dict[int, list[tuple[float, float]]] = {}
    for shape in shapes(args.tiny):
        rates = measure_attention(results, timer, shape)
        if len(set(shape[1])) == 1 and shape[5]:  # causal segments of one length
            found.setdefault(shape[1][0], []).extend(rates)
    results.fact(rates=results.data["facts"]["rates"] | attention_by_length(found))


if __name__ == "__main__":
    main()
