"""Experts in one product: the same numbers as one by one, nothing kept twice, and the choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_vl.errors import InputError
from megatron_vl.models.common.experts_way import experts_way
from megatron_vl.models.registry import load_spec
from megatron_vl.ops.experts import ExpertsCase, choose_way
from megatron_vl.ops.grouped_linear import grouped_linear
from megatron_vl.parallel import Layout

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
INPUTS, OUTPUTS = 24, 16
COUNTS = {
    "experts without a token": [0, 5, 0, 0, 3, 0],
    "an expert with all of them": [0, 7, 0],
    "one expert": [4],
    "no token": [0, 0, 0],
}


def made(counts, dtype, device="cpu"):
    """(tokens, weights, gradient of the output) of experts with so many tokens each."""
    torch.manual_seed(0)
    x = torch.randn(sum(counts), INPUTS, dtype=dtype, device=device, requires_grad=True)
    weights = [torch.randn(OUTPUTS, INPUTS, dtype=dtype, device=device, requires_grad=True)
               for _ in counts]
    return x, weights, torch.randn(sum(counts), OUTPUTS, dtype=dtype, device=device)


def one_by_one(x, weights, counts):
    return torch.cat([part @ one.t() for part, one in zip(x.split(counts), weights, strict=True)])


def grouped(x, weights, counts):
    ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
    return grouped_linear(x, weights, ends)


def outcome(linear, counts, dtype, device="cpu"):
    """The output, and the gradients of tokens and weights."""
    x, weights, of_out = made(counts, dtype, device)
    out = linear(x, weights, counts)
    return [out, *torch.autograd.grad(out, [x, *weights], of_out)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_one_product_has_the_numbers_of_one_for_each_expert(counts, dtype):
    found, wanted = (outcome(linear, counts, dtype) for linear in (grouped, one_by_one))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_a_gpus_kernel_has_the_numbers_of_one_product_for_each_expert(counts):
    found = outcome(grouped, counts, torch.bfloat16, "cuda")
    for ours, theirs in zip(
        found, outcome(one_by_one, counts, torch.bfloat16, "cuda"), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("trained", [True, False])
def test_from_forward_to_backward_weights_are_kept_once_and_tokens_only_for_their_gradient(trained):
    x, weights, of_out = made([3, 0, 5], torch.float32)
    for one in weights:
        one.requires_grad_(trained)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one,
                                                  lambda one: one):
        out = grouped(x, weights, [3, 0, 5])
    storages = {one.data_ptr() for one in kept}
    assert {one.data_ptr() for one in weights} <= storages
    assert len(kept) == 1 + len(weights) + trained and (x.data_ptr() in storages) == trained
    (of_x,) = torch.autograd.grad(out, [x], of_out)
    torch.testing.assert_close(of_x, torch.cat([
        part @ one for part, one in zip(of_out.split([3, 0, 5]), weights, strict=True)]))


HOPPER = ExpertsCase(dtype="bfloat16", widths=(2048, 768), experts=16, capability=(9, 0))
CHOSEN = [
    ("auto", HOPPER, "grouped (torch has a kernel for it)"),
    ("auto", replace(HOPPER, capability=None), "grouped (torch has a kernel for it)"),
    ("auto", replace(HOPPER, capability=(12, 0)),
     "one by one (no grouped kernel for compute capability 12.0)"),
    ("auto", replace(HOPPER, dtype="float16"), "one by one (no grouped kernel for float16)"),
    ("auto", replace(HOPPER, experts=1), "one by one (one expert a rank)"),
    ("auto", replace(HOPPER, cuda=False), "one by one (no CUDA device)"),
    ("auto", replace(HOPPER, kept="nf4"), "one by one (weights in nf4)"),
    ("off", HOPPER, "one by one (asked for)"),
    ("on", replace(HOPPER, cuda=False, dtype="float32"), "grouped (asked for)"),
    ("on", replace(HOPPER, has_grouped_mm=False), "torch is older than 2.10; use auto, or off"),
    ("on", replace(HOPPER, widths=(2048, 6)),
     "moe-grouped-gemm on cannot run here: rows of 6 numbers in bfloat16 are no multiple of 16"),
]


@pytest.mark.parametrize(("asked", "case", "wanted"), CHOSEN, ids=[row[-1] for row in CHOSEN])
def test_experts_are_one_product_where_that_gains_or_is_asked_for(asked, case, wanted):
    if asked == "on" and not wanted.endswith(")"):
        with pytest.raises(InputError, match=wanted):
            choose_way(asked, case)
    else:
        assert str(choose_way(asked, case)) == wanted


def test_a_layout_says_how_many_experts_a_rank_has_and_how_wide_they_are(experts_model_dir):
    spec, cases = load_spec(experts_model_dir), []

    def case(**of_model):
        cases.append(of_model)
        return HOPPER

    layout = Layout(tp=4, ep=2, etp=2, sequence_parallel=True)
    assert experts_way(spec, layout, "auto", dtype="float32", kept="nf4", case=case).grouped
    width = spec.decoder.experts.ffn_hidden_size // 2
    assert cases == [{"dtype": "float32", "kept": "nf4", "experts": 2, "widths": (64, width)}]


@pytest.mark.parametrize(("asked", "told"), [
    ("on", "experts grouped (asked for)"), ("off", "experts one by one (asked for)"),
])
def test_a_run_says_how_its_experts_are_computed(asked, told, experts_model_dir):
    from megatron_vl.platform import select_platform
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.plan import plan_run
    from megatron_vl.training.reporting.describe import describe

    plan = plan_run(TrainConfig.from_dict({
        "hf_config": str(experts_model_dir), "train_data_path": "data", "moe_grouped_gemm": asked,
    }), 1)
    assert f", {told}, norms " in describe(plan, select_platform())
