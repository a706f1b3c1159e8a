"""The elementwise operations, losses and updates of a 2B step, by everything that can compute them.

    python kernels.py RESULT.json [--device cuda] [--tiny] [--only OP,OP] [--warm]

Each operation at the sizes of a row of 8,192 tokens with 24,576 patches, in bf16: as plain torch,
as torch's own fused form, by torch.compile, by liger-kernel. Told are the median milliseconds
forward, and forward with backward, what part of the copy's bandwidth is reached if every input is
read and every result written once, and how far the results are from plain torch in fp32. With
--warm each is run once, so that compiled kernels are cached for a later run.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from results import Results, first_line, read_fact
from timing import Timer, copies_beyond_cache, relative_error

from megatron_vl.ops.fusion import choose_kernel, quick_gelu, swiglu
from megatron_vl.ops.grouped_linear import grouped_linear
from megatron_vl.ops.rotary import rotate

MADE_FOR_A_DEVICE = ("torch.compile", "liger", "Megatron-Core's fused", "megatron_vl's Triton",
                     "megatron_vl's, bias apart")


@dataclass(frozen=True, kw_only=True)
class Op:
    """Inputs, of which those that require a gradient get one, and who computes on them.

    Attributes:
        candidates: name -> function of the inputs that returns a tensor or a tuple of them; the
            first is plain torch and, in fp32, the reference. Some write into their inputs.
    """

    inputs: list[torch.Tensor]
    candidates: dict[str, Callable]


def draws(device: torch.device, dtype=torch.bfloat16):
    def draw(*shape: int, grad: bool = True, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(*shape, device=device, dtype=dtype) * scale
        return drawn.requires_grad_(grad)

    return draw


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def rms_norm_plain(x, weight):
    wide = x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * weight


def layer_norm_fp32(x, weight, bias):
    wide = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), 1e-6)
    return wide.to(x.dtype)


def layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def swiglu_ours(x):
    return choose_kernel("swiglu", True).function(x)


def bias_ours(x, bias):
    return choose_kernel("quick_gelu", True).function(x, bias)


def bias_residual(x, bias, residual):
    return residual + (x + bias)


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def cross_entropy_ours(logits, targets):
    return choose_kernel("cross_entropy", True).function(logits, targets, 0).sum()


def rotate_both(q, k, cos, sin):
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate_ours(q, k, cos, sin):
    turned = choose_kernel("rotary", True).function
    return turned(q, cos, sin), turned(k, cos, sin)


def rotate_by_angles(q, k, angles):
    """As Megatron-Core: cosines and sines anew for queries and for keys, in every layer."""
    both = torch.cat((angles, angles), dim=-1)

    def turned(x):
        cos, sin = both.cos().to(x.dtype), both.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turned(q), turned(k)


# ---- liger-kernel, imported where it is used ---------------------------------------------------


def liger_rope(q, k, cos, sin):
    from liger_kernel.ops import LigerRopeFunction

    width = q.shape[-1]
    q, k = (x.permute(1, 2, 0, 3) for x in (q, k))  # [b, X, s, H]
    cos, sin = (x.squeeze(2).transpose(0, 1) for x in (cos, sin))  # [b, s, R]
    q, k = LigerRopeFunction.apply(q, k, cos, sin, None, 1, width)
    return q.permute(2, 0, 1, 3), k.permute(2, 0, 1, 3)


def liger_swiglu(x):
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

    return LigerFusedGateUpSiLUMulFunction.apply(x)


def liger_rms_norm(x, weight):
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)


def liger_layer_norm(x, weight, bias):
    from liger_kernel.ops import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, 1e-6)


def liger_cross_entropy(logits, targets):
    from liger_kernel.ops import LigerCrossEntropyFunction

    return LigerCrossEntropyFunction.apply(logits, targets, None, -100, 0.0, 0.0, "sum")[0]


def mcore_cross_entropy(logits, targets):
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits.float().unsqueeze(1), targets.unsqueeze(1)).sum()


def mcore_swiglu(x):
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    return bias_swiglu_impl(x, None)


# ---- the operations ---------------------------------------------------------------------------


def ops(device: torch.device, tiny: bool) -> dict[str, Callable[[], Op]]:
    """name -> function that draws new inputs."""
    patches, tokens, words = (64, 32, 256) if tiny else (24576, 8192, 151936)
    vision, vision_heads, vision_width = (32, 2, 16) if tiny else (1280, 16, 80)
    hidden, ffn, heads, groups, width = (32, 48, 4, 2, 16) if tiny else (1536, 8960, 12, 2, 128)
    trained = tokens // 5
    draw, draw32 = draws(device), draws(device, torch.float32)

    def rope(length: int, queries: int, keys: int, size: int) -> Op:
        angles = draw32(length, 1, 1, size // 2, grad=False, scale=3.0)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        # As Megatron-Core cuts them out of the one product: only grouped queries are copied.
        many = queries // keys
        mixed = draw(length, 1, keys, (many + 2) * size, grad=False)
        q = mixed[..., : many * size].reshape(length, 1, queries, size)
        k = mixed[..., many * size : (many + 1) * size]
        return Op(
            inputs=[q.requires_grad_(), k.requires_grad_(), cos, sin],
            candidates={
                "torch": rotate_both,
                "torch, angles as Megatron-Core": lambda q, k, cos, sin: rotate_by_angles(
                    q, k, angles if q.dtype is torch.bfloat16 else angles.float()),
                "torch.compile": compiled(rotate_both), "megatron_vl's Triton": rotate_ours,
                "liger": liger_rope,
            },
        )

    def experts(rows: int, number: int, width: int, inner: int) -> Op:
        """As in Qwen3-30B-A3B: rows of 8 experts a token, unevenly many for each."""
        counts = torch.randint(number, (rows,)).bincount(minlength=number)
        lengths, ends = counts.tolist(), counts.cumsum(0, dtype=torch.int32).to(device)
        return Op(
            inputs=[draw(rows, width), *(draw(inner, width) for _ in range(number))],
            candidates={
                "torch, one by one": lambda x, *weights: torch.cat([
                    part @ one.t() for part, one in zip(x.split(lengths), weights, strict=True)]),
                "megatron_vl's, grouped": lambda x, *weights: grouped_linear(x, weights, ends),
            },
        )

    return {
        "vision bias + quick_gelu": lambda: Op(
            inputs=[draw(patches, 1, 4 * vision), draw(4 * vision)],
            candidates={
                "torch": quick_gelu, "torch.compile": compiled(quick_gelu),
                "megatron_vl's": bias_ours,
            },
        ),
        "vision rope": lambda: rope(patches, vision_heads, vision_heads, vision_width),
        "vision LayerNorm": lambda: Op(
            inputs=[draw(patches, 1, vision), draw(vision), draw(vision)],
            candidates={
                "torch, by fp32": layer_norm_fp32, "torch": layer_norm,
                "torch.compile": compiled(layer_norm_fp32), "liger": liger_layer_norm,
            },
        ),
        "vision bias + residual": lambda: Op(
            inputs=[draw(patches, 1, vision), draw(vision), draw(patches, 1, vision)],
            candidates={"torch": bias_residual, "torch.compile": compiled(bias_residual)},
        ),
        "SwiGLU": lambda: Op(
            inputs=[draw(tokens, 1, 2 * ffn)],
            candidates={
                "torch": swiglu, "torch.compile": compiled(swiglu),
                "Megatron-Core's fused": mcore_swiglu, "liger": liger_swiglu,
                "megatron_vl's choice": swiglu_ours,
            },
        ),
        "language rope": lambda: rope(tokens, heads, groups, width),
        "RMSNorm": lambda: Op(
            inputs=[draw(tokens, 1, hidden), draw(hidden)],
            candidates={
                "torch, op by op": rms_norm_plain,
                "torch": lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-6),
                "torch.compile": compiled(rms_norm_plain), "liger": liger_rms_norm,
            },
        ),
        "cross-entropy": lambda: Op(
            inputs=[draw(trained, words), torch.randint(words, (trained,), device=device)],
            candidates={
                "torch, by fp32": cross_entropy, "Megatron-Core": mcore_cross_entropy,
                "torch.compile": compiled(cross_entropy), "liger": liger_cross_entropy,
                "megatron_vl's Triton": cross_entropy_ours,
            },
        ),
        "linear layer of experts": lambda: experts(*((96, 4, 32, 48) if tiny else
                                                     (65536, 128, 2048, 1536))),
        "weight gradient": lambda: Op(
            inputs=[draw(tokens, 2 * ffn, grad=False), draw(tokens, hidden, grad=False),
                    draw32(2 * ffn, hidden, grad=False)],
            candidates={
                "torch, bf16 product + add": lambda dy, x, main: main.add_(dy.t() @ x),
                "torch.addmm(out_dtype)": lambda dy, x, main: torch.addmm(
                    main, dy.t(), x, out_dtype=torch.float32, out=main),
            },
        ),
    }


# ---- measuring --------------------------------------------------------------------------------


def gradients(function: Callable, inputs: list, weights=None):
    """(outputs, gradients) of the inputs that have one."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in inputs if x.requires_grad]
    if not wanted:
        return outputs, ()
    return outputs, torch.autograd.grad(outputs, wanted, weights)


def copied(inputs: list, wide: bool = False) -> list:
    """Inputs of their own in the same strides; in fp32 if `wide`."""

    def copy(x: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if wide and x.is_floating_point() else x.dtype
        new = torch.empty_strided(x.size(), x.stride(), dtype=dtype, device=x.device)
        return new.copy_(x.detach()).requires_grad_(x.requires_grad)

    return list(map(copy, inputs))


def measure(results: Results, timer: Timer, name: str, make: Callable[[], Op], copy: float | None):
    """A row a candidate; what raises is a row with its first line."""
    torch.manual_seed(0)
    op = make()
    bytes_in = sum(x.nbytes for x in op.inputs)
    # Not op.inputs: what writes into its inputs would leave others for the next candidate.
    sets = [copied(op.inputs)] + [
        make().inputs for _ in range(copies_beyond_cache(bytes_in) - 1)
    ]
    trains = any(x.requires_grad for x in op.inputs)
    with torch.no_grad():
        probe = next(iter(op.candidates.values()))(*copied(op.inputs))
    outputs = probe if isinstance(probe, tuple) else (probe,)
    bytes_out = sum(x.nbytes for x in outputs)
    weights = [torch.randn_like(x) if x.dim() else torch.ones_like(x) for x in outputs]
    reference = next(iter(op.candidates.values()))
    out, grads = gradients(reference, copied(op.inputs, wide=True),
                           [w.float() for w in weights])
    expected = [x.detach() for x in (*out, *grads)]
    del out, grads, probe
    for who, function in op.candidates.items():
        if not timer.platform.fuses_ops and who in MADE_FOR_A_DEVICE:
            continue
        try:
            started = time.perf_counter()
            got, grads = gradients(function, copied(op.inputs), weights)
            timer.wait()
            first = time.perf_counter() - started
            error = max(map(relative_error, (*got, *grads), expected))
            del got, grads
            forward = timer.median([partial(function, *s) for s in sets])
            both = timer.median(
                [partial(gradients, function, s, weights) for s in sets]
            ) if trains else None
        except Exception as problem:  # a row, whatever a kernel raises
            results.row("Kernels", operation=name, by=who, error=first_line(problem))
            continue
        moved, all_moved = bytes_in + bytes_out, 2 * (bytes_in + bytes_out)
        results.row(
            "Kernels", operation=name, by=who, forward_ms=forward, both_ms=both,
            forward_of_copy=copy and moved / forward / 1e9 / copy,
            both_of_copy=copy and both and all_moved / both / 1e9 / copy,
            off_from_fp32=error, first_call_s=first,
            note="both: forward with backward; of copy: bandwidth with every input read and every "
            "result written once, forward, and twice that with backward, as a part of the "
            "measured copy's; the weight gradient and experts are bound by their products instead",
        )


def measure_updates(results: Results, timer: Timer, copy: float | None, tiny: bool) -> None:
    """AdamW over fp32 parameters, and the norm of their gradients."""
    count, size = (4, 1000) if tiny else (128, 1 << 22)
    device = timer.device

    def parameters() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        made = [torch.nn.Parameter(torch.randn(size, device=device)) for _ in range(count)]
        for one in made:
            one.grad = torch.randn_like(one)
        return made

    expected, total = None, count * size
    shown = f"AdamW, {total / 1e6:,.0f} M fp32 parameters"
    for who in ("foreach", "fused"):
        try:
            mine = parameters()
            optimizer = torch.optim.AdamW(mine, lr=1e-3, weight_decay=0.01, **{who: True})
            optimizer.step()
            found = torch.stack([one.detach().norm() for one in mine])
            expected = found if expected is None else expected
            ms = timer.median([optimizer.step])
        except Exception as problem:
            results.row("Kernels", operation=shown, by=who, error=first_line(problem))
            continue
        results.row("Kernels", operation=shown, by=who, forward_ms=ms,
                    forward_of_copy=copy and 7 * 4 * total / ms / 1e9 / copy,
                    off_from_fp32=relative_error(found, expected))
        del optimizer, mine
    grads = [one.grad for one in parameters()]

    def mcore(grads):
        from megatron.core.utils import local_multi_tensor_l2_norm

        return local_multi_tensor_l2_norm(0, None, [grads], False)[0]

    def foreach(grads):
        return torch.stack(torch._foreach_norm(grads)).norm()

    expected = foreach(grads)
    shown = f"gradient norm, {count} tensors"
    for who, function in {"Megatron-Core, one by one": mcore, "_foreach_norm": foreach}.items():
        try:
            error = relative_error(function(grads), expected)
            ms = timer.median([partial(function, grads)])
        except Exception as problem:
            results.row("Kernels", operation=shown, by=who, error=first_line(problem))
            continue
        results.row("Kernels", operation=shown, by=who, forward_ms=ms, off_from_fp32=error,
                    forward_of_copy=copy and 4 * total / ms / 1e9 / copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", help="operations, between commas")
    parser.add_argument("--warm", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    results = Results(args.result)
    timer = Timer(args.device, 0.0 if args.warm else 0.005 if args.tiny else 0.08)
    copy = read_fact(args.result.parent, "probe", "copy_tbps")
    table = ops(timer.device, args.tiny)
    if not args.only or "cross-entropy" in args.only:
        from megatron_vl.parallel import Layout
        from megatron_vl.platform import initialize

        initialize(Layout())  # Megatron-Core's loss sums over a group, here of one
    for name in args.only.split(",") if args.only else table:
        measure(results, timer, name, table[name], copy)
        timer.forget()
    if not args.only:
        measure_updates(results, timer, copy, args.tiny)
    if args.warm:
        results.data["tables"].clear()  # timed beside others
    results.save()


if __name__ == "__main__":
    main()
