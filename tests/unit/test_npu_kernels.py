"""Kernels of Ascend NPUs against torch's, by a reference of what torch_npu documents of them.

The reference, shadow/torch_npu_kernels.py, refuses what the kernels do not take.
"""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT
from shadow import torch_npu_kernels

from megatron_vl.data.encode.rows import empty_row, make_batch
from megatron_vl.models.qwen2_5_vl.tower import window_order
from megatron_vl.ops import fusion, rotary
from megatron_vl.ops.attention import choose_backend
from megatron_vl.ops.fusion import OPERATIONS, choose_kernel
from megatron_vl.ops.segments import Segments
from megatron_vl.platform import base


@pytest.fixture
def npu(monkeypatch):
    """This process on a machine with an NPU."""
    platform = SimpleNamespace(name="npu", runs_cuda=False)
    monkeypatch.setitem(sys.modules, "torch_npu", torch_npu_kernels)
    for module in ("attention_npu", "fusion_npu"):  # each has the torch_npu of its import
        monkeypatch.delitem(sys.modules, f"megatron_vl.ops.{module}", raising=False)
        monkeypatch.delattr(f"megatron_vl.ops.{module}", raising=False)
    kind = base.Kind(name="npu", is_here=lambda: True, load=lambda: platform)
    monkeypatch.setattr(base, "PLATFORMS", [kind, *base.PLATFORMS])
    choose_kernel.cache_clear()
    yield
    choose_kernel.cache_clear()
    for module in ("attention_npu", "fusion_npu"):
        sys.modules.pop(f"megatron_vl.ops.{module}", None)


def outcome(function, inputs, *others, **options):
    """The output, and the gradients of `inputs`."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs, *others, **options)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_equal(found, expected, tolerance=2e-6):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ---- attention --------------------------------------------------------------------------------

ROWS = make_batch(
    [empty_row(), empty_row()], row_length=300, pad_token=0,
    positions=SimpleNamespace(axes=1),
)
WINDOWS = [4 * cells for grid in ((1, 10, 12), (2, 34, 6)) for cells in window_order(grid, 2, 4)[1]]
PACKED, MANY = [1, 30, 2, 17, 16, 1, 30], [3, 2] * 520  # more than a call takes
ATTENTION = {  # lengths, causal, groups of 4 heads
    "packed rows": (PACKED, True, 4),
    "packed rows, grouped heads": (PACKED, True, 2),
    "frames of images": ([24, 24, 24, 40, 16], False, 4),
    "windows": (WINDOWS, False, 4),
    "many segments": (MANY, False, 2),
    "many segments, causal": (MANY, True, 4),
    "rows of padding": (Segments.from_cu_seqlens(ROWS.cu_seqlens).lengths, True, 4),
}


@pytest.mark.parametrize(("lengths", "causal", "groups"), ATTENTION.values(), ids=ATTENTION)
def test_attention_equals_sdpa(lengths, causal, groups, npu):
    torch.manual_seed(0)
    inputs = [torch.randn(sum(lengths), heads, 16) for heads in (4, groups, groups)]
    found, expected = (
        outcome(choose_backend(name, dtype=torch.float32, head_dim=16).attention, inputs,
                Segments(lengths), causal=causal, scale=0.3)
        for name in ("npu-fusion", "sdpa"))
    assert_equal(found, expected)


def test_an_npu_takes_its_own_kernel_but_none_that_may_not_repeat_itself(npu):
    choice = choose_backend(dtype="bfloat16", head_dim=80)
    assert choice.name == "npu-fusion"
    choice = choose_backend(dtype="bfloat16", head_dim=80, deterministic=True)
    assert choice.name == "sdpa"
    assert choice.reason.endswith("npu-fusion: not known to be deterministic")


# ---- operations -------------------------------------------------------------------------------

ROTARY = rotary.Rotary.of(torch.linspace(-9, 9, 80).view(5, 2, 1, 8), torch.float32)
KERNELS = {  # operation: shapes whose gradients are compared, what else it is given
    "rotary": ([(5, 2, 3, 16)], (ROTARY.cos, ROTARY.sin)),
    "swiglu": ([(7, 2, 12), (12,)], ()),
    "quick_gelu": ([(7, 2, 12), (12,)], ()),
    "gelu": ([(7, 2, 12), (12,)], ()),
    "rms_norm": ([(7, 2, 12), (12,)], (1e-5,)),
}


@pytest.mark.parametrize(("operation", "case"), KERNELS.items(), ids=KERNELS)
def test_a_kernel_equals_the_reference(operation, case, npu):
    shapes, others = case
    torch.manual_seed(0)
    inputs = [3 * torch.randn(shape) for shape in shapes]
    kernel = choose_kernel(operation, True)
    assert kernel.name == "npu"
    reference = OPERATIONS[operation][fusion.REFERENCE]()
    assert_equal(outcome(kernel.function, inputs, *others), outcome(reference, inputs, *others))


def test_gates_need_not_lie_together_nor_be_there(npu):
    swiglu, x = choose_kernel("swiglu", True).function, torch.randn(5, 24)
    assert_equal([swiglu(x[:, 4:16])], [fusion.swiglu(x[:, 4:16])])
    assert swiglu(x[:0]).shape == (0, 12)  # of an expert without tokens


def test_an_exact_gelu_is_never_torchs_where_that_is_the_form_with_tanh(npu):
    x = torch.linspace(-4, 4, 100)
    for fused in (True, False):
        found = choose_kernel("gelu", fused).function(x)
        assert torch.allclose(found, torch.nn.functional.gelu(x), atol=1e-6)
        assert choose_kernel("gelu", fused).name == "npu"
    assert choose_kernel("quick_gelu", False).name == fusion.REFERENCE


def test_no_module_takes_torchs_gelu_past_the_table():
    """A judge runs on the CPU."""
    for path in sorted((ROOT / "megatron_vl").rglob("*.py")):
        if path.name != "reference.py" and path != ROOT / "megatron_vl" / "ops" / "fusion.py":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"\b(F|functional|nn)\.(gelu|GELU)\b", text), path


# ---- the reference ----------------------------------------------------------------------------

TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
Q, K = torch.randn(9, 4, 8), torch.randn(9, 2, 8)
TAKEN = dict(query=Q, key=K, value=K, head_num=4, input_layout="TND",
             actual_seq_qlen=[4, 9], actual_seq_kvlen=[4, 9])
REFUSED = {  # what is given instead, what is said of it
    "no lengths": (dict(actual_seq_qlen=None), "ends of the segments"),
    "lengths on the device": (dict(actual_seq_qlen=torch.tensor([4, 9])), "ends of the segments"),
    "a leading 0": (dict(actual_seq_qlen=[0, 4, 9], actual_seq_kvlen=[0, 4, 9]), "leading 0"),
    "as many of keys": (dict(actual_seq_kvlen=[9]), "different lengths"),
    "tokens left over": (dict(actual_seq_qlen=[4, 8]), "end at 8 of 9"),
    "heads of all ranks": (dict(head_num=8), "head_num 8 of a query of 4"),
    "three groups": (dict(key=torch.randn(9, 3, 8), value=torch.randn(9, 3, 8)), "3 groups"),
    "two dtypes": (dict(value=K.half()), "dtypes"),
    "float64": (dict(query=Q.double(), key=K.double(), value=K.double()), "dtypes"),
    "wide heads": (dict(query=torch.randn(9, 4, 776)), "head dim"),
    "1,025 segments": (
        dict(query=torch.randn(2050, 4, 8), actual_seq_qlen=list(range(2, 2051, 2))),
        "1025 segments"),
    "padding token by token": (
        dict(query=torch.randn(99, 4, 8), key=torch.randn(99, 2, 8), value=torch.randn(99, 2, 8),
             actual_seq_qlen=list(range(1, 100)), actual_seq_kvlen=list(range(1, 100))),
        "SIGSEGV"),
    "a mask of another size": (
        dict(atten_mask=TRIANGLE[:9, :9], sparse_mode=3), "compressed mask|a mask of shape"),
    "torch's mask": (dict(atten_mask=~TRIANGLE, sparse_mode=3), "1 above its diagonal"),
    "a mode that packed rows do not have": (
        dict(atten_mask=TRIANGLE, sparse_mode=5), "sparse_mode 5"),
    "a row that sees nothing": (
        dict(atten_mask=torch.ones(5, 5, dtype=torch.bool), sparse_mode=1), "all 1"),
    "a mask beside other tokens": (
        dict(atten_mask=TRIANGLE[:5, :5], sparse_mode=0, pre_tockens=1, next_tockens=0),
        "disagree"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_attention_does_not_take_is_an_error_of_the_reference(changes, said):
    with pytest.raises(RuntimeError, match=said):
        torch_npu_kernels.npu_fusion_attention(**TAKEN | changes)


# (i, j): which tokens of a segment query i looks at; the last is given too few queries.
MODES = {
    "no mask, whatever else is said": (
        dict(sparse_mode=3, pre_tockens=0, next_tockens=0), lambda i, j: True),
    "the given mask": (dict(sparse_mode=1, atten_mask=TRIANGLE[:5, :5]), lambda i, j: j <= i),
    "the given mask and tokens": (
        dict(sparse_mode=0, atten_mask=TRIANGLE[:5, :5], next_tockens=0), lambda i, j: j <= i),
    "left up": (dict(sparse_mode=2, atten_mask=TRIANGLE), lambda i, j: j <= i),
    "right down": (dict(sparse_mode=3, atten_mask=TRIANGLE), lambda i, j: j <= i),
    "a band": (dict(sparse_mode=4, atten_mask=TRIANGLE, pre_tockens=1, next_tockens=1),
               lambda i, j: abs(i - j) <= 1),
}


@pytest.mark.parametrize(("options", "sees"), MODES.values(), ids=MODES)
def test_the_modes_of_the_mask(options, sees):
    out, *rest = torch_npu_kernels.npu_fusion_attention(**TAKEN | options)
    for start, length in ((0, 4), (4, 5)):
        seen = torch.tensor([[sees(i, j) for j in range(length)] for i in range(length)])
        part = slice(start, start + length)
        q, k = Q[part].transpose(0, 1), K[part].transpose(0, 1).repeat_interleave(2, 0)
        want = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], k[None], attn_mask=seen, scale=1.0)[0].transpose(0, 1)
        torch.testing.assert_close(out[part], want, rtol=1e-5, atol=1e-5)
    assert len(rest) == 6 and rest[0].shape == (9, 4, 8)


X = torch.randn(5, 2, 3, 16)
OPERANDS = {
    "a table of half the width": lambda n: n.npu_rotary_mul(X, ROTARY.cos, ROTARY.sin),
    "a table for all rows and places": lambda n: n.npu_rotary_mul(X, X[:1, :1, :1], X[:1, :1, :1]),
    "a wide head": lambda n: n.npu_rotary_mul(*[torch.randn(1, 1, 1, 896)] * 3),
    "gates apart": lambda n: n.npu_swiglu(X.transpose(0, 3)),
    "no gates": lambda n: n.npu_swiglu(X[:0]),
    "a norm's weight in fp16": lambda n: n.npu_rms_norm(X, torch.ones(16).half()),
    "a norm of a vector": lambda n: n.npu_rms_norm(X[0, 0, 0], torch.ones(16)),
    "double": lambda n: n.npu_fast_gelu(X.double()),
}


@pytest.mark.parametrize("call", OPERANDS.values(), ids=OPERANDS)
def test_what_an_operation_does_not_take_is_an_error_of_the_reference(call):
    with pytest.raises(RuntimeError):
        call(torch_npu_kernels)
