"""Weights in blocks: bitsandbytes' values, what autograd keeps, and blocks that a layout cuts."""

from __future__ import annotations

import hashlib

import pytest
import torch
from megatron.core.tensor_parallel.layers import LinearWithFrozenWeight
from safetensors.torch import load_file

from megatron_vl.models import family, load_spec
from megatron_vl.models.common.quantized_base import (
    cut_within_blocks,
    is_layer_linear,
    keeps_blocks,
)
from megatron_vl.ops import quantized
from megatron_vl.ops.blockwise import FORMS, quantized_bytes
from megatron_vl.ops.quantized import LEVELS, QuantizedTensor, stored
from megatron_vl.parallel import Layout
from megatron_vl.parity.quantized import write_quantized
from megatron_vl.parity.ranks import Setting
from megatron_vl.weights.rules import box

# What bitsandbytes 0.50.2 makes on a CPU of WEIGHT: its second block is zeros, its last is short.
NUMBERS = torch.arange(3 * 67)
WEIGHT = torch.where(NUMBERS // 64 == 1, 0, (NUMBERS * 7919 % 1009 - 504) / 512).view(3, 67)
SCALES = [0.984375, 0.0, 0.966796875, 0.939453125]
FIRST, LAST = (  # the codes of the blocks before and behind the zeros
    "0ec8521fda7410ec9531fdb7420eda631feb8521fda7310ec9521fdb7420ed96",
    "9631feb8420fda6310ec8521fdb7410ec9631feb8420eda6310ec8521fdb7410ec9521feb7",
)
VALUES = {  # sha256 of the bytes of the values that the codes stand for
    torch.float32: "389e94b88d40d976", torch.bfloat16: "c4b1140474443a86",
    torch.float16: "e5692813061ca6b4",
}
DTYPES = list(VALUES)


def kept(weight: torch.Tensor, form: str) -> QuantizedTensor:
    made = QuantizedTensor.empty_like(weight, form)
    made.store_(weight)
    return made


def test_the_judge_is_given_every_expert_of_a_tensor_quantised_by_itself(
    deepstack_experts_model_dir, tmp_path
):
    spec = load_spec(deepstack_experts_model_dir)
    written = write_quantized(tmp_path, deepstack_experts_model_dir, spec,
                              Setting(quantize_base="nf4"))
    before, after = (load_file(one / "model.safetensors")
                     for one in (deepstack_experts_model_dir, written))
    assert before.keys() == after.keys()
    name = "model.language_model.layers.3.mlp.experts.gate_up_proj"
    for expert, has in zip(before[name], after[name], strict=True):  # [H, 2F] each
        gate, up = (kept(one, "nf4").dequantize() for one in expert.T.contiguous().chunk(2))
        assert torch.equal(has.T, torch.cat([gate, up]))
    router = "model.language_model.layers.3.mlp.gate.weight"
    assert torch.equal(before[router], after[router])


def digest(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("span", [64, 128, 2**21])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_what_bitsandbytes_makes_of_it(dtype, span, monkeypatch):
    monkeypatch.setattr(quantized, "SPAN", span)  # values at a time: it changes none
    made = kept(WEIGHT.to(dtype), "nf4")
    assert made.scales.tolist() == [torch.tensor(one).to(dtype).item() for one in SCALES]
    if dtype == torch.float32:
        assert bytes(made.codes.tolist()).hex() == f"{FIRST}{'7' * 64}{LAST}"
    whole = made.dequantize()
    assert (whole.dtype, whole.shape, digest(whole)) == (dtype, WEIGHT.shape, VALUES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_the_nearest_of_255_levels(dtype):
    weight = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    made, blocks = kept(weight, "int8"), weight.double()
    scales = blocks.abs().amax(1, keepdim=True)
    assert torch.equal(made.scales.double(), scales[:, 0])
    levels = (made.codes.double().view(500, 64) - 128).clamp(min=-127)
    off = (levels - blocks / scales * 127).abs()
    assert off.max() <= 0.5 + 1e-5
    want = (levels / 127 * scales).float()
    torch.testing.assert_close(made.dequantize(), want.to(dtype))


# Flat: its kernel for CPUs takes other blocks than it made where rows are no multiple of 64 long.
@pytest.mark.parametrize("shape", [(201,), (128 * 96,), (128, 128), (500, 257)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_says_the_same_where_it_is_installed(dtype, shape):
    bnb = pytest.importorskip("bitsandbytes", minversion="0.50").functional
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(bnb.get_4bit_type("nf4", device="cpu"), torch.tensor(LEVELS["nf4"]))
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    made = kept(weight, "nf4")
    assert torch.equal(codes.view(-1), made.codes) and torch.equal(state.absmax, made.scales)
    assert torch.equal(bnb.dequantize_4bit(codes, state).view(shape), made.dequantize())
    made = kept(weight, "int8")
    codes, state = bnb.quantize_blockwise(weight, code=torch.tensor(LEVELS["int8"]), blocksize=64)
    assert torch.equal(state.absmax, made.scales)
    theirs, ours = (bnb.dequantize_blockwise(one, state).to(dtype)
                    for one in (codes, made.codes.view(shape)))
    assert torch.equal(ours, made.dequantize())
    assert (theirs != ours).float().mean() < 0.005  # it rounds some to the second nearest


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 67), (7, 9), (64, 64)])
def test_a_weight_takes_the_bytes_that_are_said(form, shape):
    made = kept(torch.randn(shape), form)
    assert sum(one.nbytes for one in stored(made)) == quantized_bytes(made.numel(), form)


@pytest.mark.parametrize("form", FORMS)
def test_backward_keeps_codes_and_multiplies_by_the_weight_that_forward_did(form):
    weight = torch.nn.Parameter(kept(torch.randn(96, 64), form), requires_grad=False)
    x = torch.randn(5, 2, 64, requires_grad=True)
    saved = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda a: saved.append(a) or a, lambda a: a)
    with keep:
        y = LinearWithFrozenWeight.apply(x, weight, None, False, None)
    assert [type(one) for one in saved] == [QuantizedTensor] and saved[0].codes is weight.codes
    again, whole = x.detach().requires_grad_(), weight.dequantize()
    torch.testing.assert_close(y, again @ whole.T, rtol=0, atol=0)
    gradient = torch.randn(y.shape)
    y.backward(gradient)
    (again @ whole.T).backward(gradient)
    torch.testing.assert_close(x.grad, again.grad, rtol=0, atol=0)
    assert weight.grad is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_with_a_nan_or_an_infinity_is_nan_as_a_whole_and_no_other_is(form, bad):
    weight = torch.randn(3, 64)
    weight[1, 5] = bad
    assert kept(weight, form).dequantize().isnan().all(1).tolist() == [False, True, False]


def test_what_would_write_to_a_whole_weight_that_is_thrown_away_is_refused():
    weight = kept(torch.randn(2, 64), "nf4")
    with pytest.raises(TypeError, match="would write to a quantised weight"):
        weight.zero_()


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("model", ["model_dir", "wide_model_dir", "baichuan_model_dir",
                                   "resampler_model_dir", "qk_norm_model_dir", "experts_model_dir",
                                   "deepstack_experts_model_dir"])
def test_a_layout_that_cuts_no_block_changes_no_value_and_others_are_named(model, tp, request):
    spec = load_spec(request.getfixturevalue(model))
    weights = family(spec.model_type).weight_map(spec)
    said = cut_within_blocks(weights, Layout(tp=tp))
    linear = list(filter(is_layer_linear, weights.weights))
    assert len(linear) == 4
    for weight in linear:
        generator, rule = torch.Generator().manual_seed(0), weight.rule
        published = {key: torch.randn(shape, generator=generator)
                     for key, shape in rule.published().items()}
        want = {key: kept(one, "nf4").dequantize() for key, one in published.items()}
        same = True
        for rank in range(tp):
            shape, pieces = rule.pieces(tp, rank)
            own = torch.zeros(shape)
            boxes = [(one.key, box(one.at, one.shape), box(one.start, one.shape))
                     for one in pieces]
            for key, at, start in boxes:
                own[at] = published[key][start]
            whole = kept(own, "nf4").dequantize()
            same &= all(torch.equal(whole[at], want[key][start]) for key, at, start in boxes)
        assert keeps_blocks(rule, tp) == same
        assert (".".join(weight.name.split(".")[-2:]) in said) != same
