"""Variable-length attention against the plain formula, its backends, and their choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vl.errors import InputError
from megatron_vl.ops.attention import (
    BACKENDS,
    LIBRARIES,
    AttentionCase,
    Backend,
    check_backend,
    choose_backend,
)
from megatron_vl.ops.segments import Segments

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without it does")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def plain(q, k, v, lengths, causal, scale):
    """softmax(q k^T) v, one segment and one head at a time."""
    repeat = q.shape[1] // k.shape[1]
    out, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        heads = []
        for n in range(q.shape[1]):
            scores = q[rows, n] @ k[rows, n // repeat].T * scale
            if causal:
                scores = scores.masked_fill(
                    torch.ones(length, length).triu(1).bool(), float("-inf")
                )
            heads.append(scores.softmax(-1) @ v[rows, n // repeat])
        out.append(torch.stack(heads, 1))
        start += length
    return torch.cat(out)


LENGTHS = {
    "one segment": [7],
    "equal segments": [4, 4, 4],
    "long and short": [1, 30, 2, 17, 16, 1, 30],
    "descending by one": [9, 8, 7, 6, 5],
}


def gradients(out, inputs, weights):
    return torch.autograd.grad((out * weights).sum(), inputs)


DOUBLE = AttentionCase.here(dtype=torch.float64, head_dim=8, touch_device=False)


@pytest.mark.parametrize("name", [n for n, b in BACKENDS.items() if b.why_not(DOUBLE) is None])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_output_and_gradients_equal_the_plain_formula(name, causal, groups, lengths):
    torch.manual_seed(0)
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, heads, 8, dtype=torch.float64, requires_grad=True)
               for heads in (4, groups, groups))
    want = plain(q, k, v, lengths, causal, 0.3)
    weights = torch.randn_like(want)
    expected = gradients(want, (q, k, v), weights)
    attend = choose_backend(name, dtype=q.dtype, head_dim=8).attention
    got = attend(q, k, v, Segments(lengths), causal=causal, scale=0.3)
    assert torch.allclose(got, want, atol=1e-12)
    for ours, theirs in zip(gradients(got, (q, k, v), weights), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_a_change_in_one_segment_leaves_the_others_untouched():
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, 2, 4) for _ in range(3))
    attend = choose_backend("sdpa", dtype=torch.float32, head_dim=4).attention
    before = attend(q, k, v, Segments([5, 3, 4]), causal=True, scale=0.5)
    v[5:8] += 1
    after = attend(q, k, v, Segments([5, 3, 4]), causal=True, scale=0.5)
    changed = (before != after).flatten(1).any(1)
    assert changed[5:8].all() and not changed[:5].any() and not changed[8:].any()


def test_segments_round_trip_with_cumulative_lengths():
    segments = Segments([3, 1, 2])
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert segments.cu_seqlens.dtype == torch.int32
    assert Segments.from_cu_seqlens(segments.cu_seqlens).lengths == [3, 1, 2]
    assert (segments.num_tokens, segments.max_length) == (6, 3)


def test_an_empty_segment_is_refused():
    with pytest.raises(InputError, match="positive"):
        Segments([3, 0])


# ---- whether a backend can run ----------------------------------------------------------------

HOPPER = AttentionCase(
    dtype="bfloat16", head_dim=128, cuda=True, capability=(9, 0), cudnn=91002,
    versions={"torch": (2, 12, 0), "transformer-engine": (2, 11, 0), "flash-attn": (2, 8, 3),
              "flash-attn-4": (4, 0, 0)},
)
OF_CUDA = [name for name in BACKENDS if name not in ("npu-fusion", "sdpa")]
NO_NPU = {"npu-fusion": "no Ascend NPU"}
NPU = dict(npu=True, cuda=False, capability=None, cudnn=0)
NO_TE = {"torch": (2, 12), "flash-attn": (2, 8, 3), "flash-attn-4": (4, 0)}
NO_FLASH = {"torch": (2, 12), "transformer-engine": (2, 11), "flash-attn-4": (4, 0)}

# What differs from HOPPER -> the backends that cannot run then, and why; all others can, but on a
# machine without an NPU that of NPUs.
CASES = {
    "all is there": ({}, {}),
    "fp16": (dict(dtype="float16"), {}),
    "vision towers' heads": (dict(head_dim=80), {}),
    "deterministic": (dict(deterministic=True), {}),
    "fp32": (
        dict(dtype="float32"),
        dict.fromkeys(OF_CUDA, "no kernel for float32"),
    ),
    "no GPU": (
        dict(cuda=False, capability=None, cudnn=0),
        dict.fromkeys(OF_CUDA, "no CUDA device"),
    ),
    "an NPU": (
        NPU, {**dict.fromkeys(OF_CUDA, "no CUDA device"), "npu-fusion": None},
    ),
    "an NPU, fp32": (
        NPU | dict(dtype="float32"),
        {**dict.fromkeys(OF_CUDA, "no CUDA device"), "npu-fusion": None},
    ),
    "an NPU, deterministic": (
        NPU | dict(deterministic=True),
        {**dict.fromkeys(OF_CUDA, "no CUDA device"),
         "npu-fusion": "not known to be deterministic"},
    ),
    "an NPU, fp64": (
        NPU | dict(dtype="float64"),
        {**dict.fromkeys(OF_CUDA, "no CUDA device"), "npu-fusion": "no kernel for float64"},
    ),
    "an NPU, wide heads": (
        NPU | dict(head_dim=776),
        {**dict.fromkeys(OF_CUDA, "no CUDA device"), "npu-fusion": "head dim 776 is above 768"},
    ),
    "no look at the GPU yet": (dict(capability=None, cudnn=0), {}),
    "no TransformerEngine": (
        dict(versions=NO_TE),
        dict.fromkeys(("te-fused", "te-flash"), "transformer-engine is not installed"),
    ),
    "no flash-attn": (
        dict(versions=NO_FLASH),
        dict.fromkeys(("te-flash", "flash2"), "flash-attn is not installed"),
    ),
    "flash-attn 3 instead": (
        dict(versions={**NO_FLASH, "flash-attn-3": (3, 0)}),
        {"flash2": "flash-attn is not installed"},
    ),
    "flash-attn 3 where it cannot run": (
        dict(versions={**NO_FLASH, "flash-attn-3": (3, 0)}, capability=(10, 0)),
        dict.fromkeys(("te-flash", "flash2"), "flash-attn is not installed"),
    ),
    "old libraries": (
        dict(versions={"torch": (2, 8, 0), "transformer-engine": (1, 13), "flash-attn": (2, 6, 3)}),
        {"te-fused": "transformer-engine 1.13 is older than 2.4",
         "te-flash": "transformer-engine 1.13 is older than 2.4",
         "flash2": "flash-attn 2.6.3 is older than 2.7",
         "flash4": "flash-attn-4 is not installed",
         "torch-varlen": "torch 2.8.0 is older than 2.11"},
    ),
    "Ampere": (
        dict(capability=(8, 0)),
        dict.fromkeys(("te-fused", "flash4"), "compute capability 8.0 is below 9.0"),
    ),
    "Turing": (
        dict(capability=(7, 5)),
        {**dict.fromkeys(("te-fused", "flash4"), "compute capability 7.5 is below 9.0"),
         **dict.fromkeys(("te-flash", "flash2", "torch-varlen"),
                         "compute capability 7.5 is below 8.0")},
    ),
    "Blackwell": (dict(capability=(10, 0)), {}),
    "Blackwell, deterministic": (
        dict(capability=(10, 0), deterministic=True),
        {"te-fused": "not deterministic on compute capability 10.0"},
    ),
    "Blackwell, wide heads": (
        dict(capability=(10, 0), head_dim=192),
        {"te-fused": "head dim 192 is no multiple of 8 up to 128",
         "flash4": "head dim 192 is above 128 on compute capability 10.0"},
    ),
    "Blackwell of a workstation, deterministic": (
        dict(capability=(12, 0), deterministic=True),
        {"te-fused": "compute capability 12.0 has no kernel for packed rows",
         "flash4": "not deterministic on compute capability 12.0"},
    ),
    "Blackwell of a workstation": (
        dict(capability=(12, 0)),
        {"te-fused": "compute capability 12.0 has no kernel for packed rows"},
    ),
    "no cuDNN": (
        dict(cudnn=0), {"te-fused": "needs cuDNN 9.6 or newer, but 9.10.0 and 9.10.1"},
    ),
    "a broken cuDNN": (
        dict(cudnn=91001), {"te-fused": "needs cuDNN 9.6 or newer, but 9.10.0 and 9.10.1"},
    ),
    "wide heads": (
        dict(head_dim=192), {"te-fused": "head dim 192 is no multiple of 8 up to 128"},
    ),
    "odd heads": (
        dict(head_dim=36),
        {"te-fused": "head dim 36 is no multiple of 8 up to 128",
         **dict.fromkeys(("te-flash", "flash2", "flash4", "torch-varlen"),
                         "head dim 36 is no multiple of 8 up to 256")},
    ),
}


@pytest.mark.parametrize(("changes", "reasons"), CASES.values(), ids=CASES)
def test_a_backend_says_why_it_cannot_run(changes, reasons):
    case = replace(HOPPER, **changes)
    said = {name: backend.why_not(case) for name, backend in BACKENDS.items()}
    assert said == dict.fromkeys(BACKENDS) | NO_NPU | reasons


def test_this_machine_is_seen_as_it_is():
    case = AttentionCase.here(dtype=torch.bfloat16, head_dim=80, deterministic=True)
    assert (case.dtype, case.head_dim, case.deterministic) == ("bfloat16", 80, True)
    assert case.cuda is torch.cuda.is_available() and (case.capability is not None) is case.cuda
    release = tuple(map(int, torch.__version__.split("+")[0].split(".")))
    assert case.versions["torch"] == release and set(case.versions) <= set(LIBRARIES)
    assert AttentionCase.here(dtype="bfloat16", head_dim=80, touch_device=False).capability is None


# ---- which one is chosen ----------------------------------------------------------------------


def table(**rows):
    """A small table: name -> why not, None to run, or an error to be raised while it loads."""

    def row(name, outcome):
        def load(deterministic):
            if isinstance(outcome, Exception):
                raise outcome
            return name, deterministic

        return Backend(
            name=name, why_not=lambda case: outcome if isinstance(outcome, str) else None, load=load
        )

    return {name: row(name, outcome) for name, outcome in rows.items()}


BROKEN = ImportError("undefined symbol: _ZN3c10\nin three more lines")

AUTO = {
    "the first": (table(a=None, b=None), "a (first that runs here)"),
    "the first that runs": (
        table(a="too old", b="no GPU", c=None, d=None),
        "c (first that runs here; a: too old, b: no GPU)"),
    "not one that does not load": (
        table(a=BROKEN, b=None),
        "b (first that runs here; a: does not load, undefined symbol: _ZN3c10)"),
}


@pytest.mark.parametrize(("backends", "said"), AUTO.values(), ids=AUTO)
def test_auto_takes_the_first_of_the_table_that_runs(backends, said):
    choice = choose_backend(dtype="float32", head_dim=8, backends=backends)
    assert str(choice) == said and choice.attention == (choice.name, False)


FL = {  # what runs here -> what `auto`, FL false, and `flash-first`, FL true, take
    "all": (BACKENDS, "te-fused", "te-flash"),
    "cuDNN's, flash-attention by itself": (("te-fused", "flash2", "torch-varlen"), "te-fused",
                                           "flash2"),
    "cuDNN's alone": (("te-fused", "torch-varlen"), "te-fused", "te-fused"),
    "flash-attention alone": (("flash2", "torch-varlen"), "flash2", "flash2"),
    "torch alone": (("torch-varlen",), "torch-varlen", "torch-varlen"),
    "nothing": ((), "sdpa", "sdpa"),
}


@pytest.mark.parametrize(("runs", "auto", "flash_first"), FL.values(), ids=FL)
def test_fl_orders_the_preference_and_sdpa_is_last(runs, auto, flash_first):
    backends = table(**{name: None if name in (*runs, "sdpa") else "not here" for name in BACKENDS})
    for order, taken in (("auto", auto), ("flash-first", flash_first)):
        choice = choose_backend(order, dtype="bfloat16", head_dim=128, backends=backends)
        assert choice.name == taken and choice.reason.startswith("first that runs here")


def test_one_asked_for_is_taken_and_told_to_be_deterministic():
    choice = choose_backend(
        "b", dtype="float32", head_dim=8, deterministic=True, backends=table(a=None, b=None)
    )
    assert str(choice) == "b (asked for)" and choice.attention == ("b", True)


REFUSED = {
    "unknown": ("c", table(a=None, b=None),
                "attention-backend 'c' is unknown; use one of auto, flash-first, a, b."),
    "cannot run": ("b", table(a=None, b="no GPU"),
                   "attention-backend b cannot run here: no GPU; use auto, or sdpa, which runs "
                   "everywhere."),
    "does not load": ("b", table(a=None, b=BROKEN),
                      "attention-backend b cannot run here: does not load, undefined symbol: "
                      "_ZN3c10; use auto, or sdpa, which runs everywhere."),
}


@pytest.mark.parametrize(("name", "backends", "sentence"), REFUSED.values(), ids=REFUSED)
def test_one_asked_for_that_cannot_run_is_refused_by_one_sentence(name, backends, sentence):
    with pytest.raises(InputError) as refused:
        choose_backend(name, dtype="float32", head_dim=8, backends=backends)
    assert str(refused.value) == sentence


NO_DEVICE = dict.fromkeys(OF_CUDA, "no CUDA device") | NO_NPU
NO_GPU = ", ".join(f"{name}: {why}" for name, why in NO_DEVICE.items())


@pytest.fixture
def plan_with(hf_dir):
    """Plans a run of the tiny model with these options."""
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.plan import plan_run

    def plan_with(**options):
        run = {"hf_config": str(hf_dir), "train_data_path": "data", **options}
        return plan_run(TrainConfig.from_dict(run), 1)

    return plan_with


@without_gpu
def test_a_run_says_once_what_computes_attention_and_why(plan_with):
    from megatron_vl.platform import select_platform
    from megatron_vl.training.reporting.describe import describe

    platform = select_platform()
    lines = describe(plan_with(bf16=True), platform).splitlines()
    assert lines[-2] == f"attention: sdpa (first that runs here; {NO_GPU})"
    assert lines[-1] == ("operations: rotary torch, swiglu torch, cross_entropy torch, quick_gelu "
                         "torch, norms torch; weight gradient added after its product")
    assert sum("attention" in line for line in lines) == 1
    lines = describe(plan_with(attention_backend="sdpa"), platform).splitlines()
    assert lines[-2] == "attention: sdpa (asked for)"


def test_a_run_is_refused_before_a_process_starts(plan_with):
    known = "use one of auto, flash-first, te-fused"
    with pytest.raises(InputError, match=f"attention-backend is 'fast'; {known}"):
        plan_with(attention_backend="fast")
    plan_with(attention_backend="sdpa")
    on_gpu = "no kernel for float32" if torch.cuda.is_available() else "no CUDA device"
    for name, why in (dict.fromkeys(OF_CUDA, on_gpu) | NO_NPU).items():
        with pytest.raises(InputError, match=f"{name} cannot run here: {why}; use auto, or sdpa"):
            plan_with(attention_backend=name)


def test_heads_that_only_one_tower_has_are_seen_too():
    check_backend("te-fused", replace(HOPPER, capability=None))
    with pytest.raises(InputError, match="head dim 36"):
        check_backend("te-fused", replace(HOPPER, capability=None, head_dim=36))


# ---- torch-varlen, whose kernels need a GPU but whose arguments do not -------------------------


class Calls(TorchDispatchMode):
    """Notes the arguments of torch's own operator for packed rows, by name."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._flash_attention_forward.default:
            names = (one.name for one in func._schema.arguments)
            self.seen = dict(zip(names, args, strict=False)) | (kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("causal", "window"), [(True, (-1, 0)), (False, (-1, -1))])
@pytest.mark.parametrize("groups", [4, 2])
def test_torch_varlen_takes_the_arguments_it_is_given(causal, window, groups):
    from megatron_vl.ops.torch_varlen import attention

    with FakeTensorMode(), Calls() as calls:
        q, k, v = (torch.empty(9, heads, 80, dtype=torch.bfloat16, requires_grad=True)
                   for heads in (4, groups, groups))
        segments = Segments([5, 1, 3])
        out = attention(q, k, v, segments, causal=causal, scale=0.3)
        found = gradients(out, (q, k, v), 1.0)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert [g.shape for g in found] == [q.shape, k.shape, v.shape]
    seen = calls.seen
    assert seen["cum_seq_q"] is seen["cum_seq_k"] is segments.cu_seqlens
    assert seen["cum_seq_q"].shape == (4,) and seen["cum_seq_q"].dtype == torch.int32
    assert (seen["max_q"], seen["max_k"], seen["scale"]) == (5, 5, 0.3)
    assert seen["is_causal"] is causal
    assert (seen["window_size_left"], seen["window_size_right"]) == window


# ---- on a GPU ---------------------------------------------------------------------------------

LONG_AND_SHORT = [600, *[1, 2, 3, 7, 16, 17, 64, 65, 128, 1, 33] * 2]
# |difference| / (|reference| + its standard deviation), of the output and of the gradients: twice
# what torch's SDPA in that dtype on a CPU differs by here, 1.6e-2 and 6.8e-2, 1.5e-3 and 7.6e-3.
TOLERANCE = {torch.bfloat16: (3.2e-2, 1.4e-1), torch.float16: (3e-3, 1.5e-2)}


def on_gpu(dtype, head_dim, groups):
    """q, k, v and the weights of the output, standard normal."""
    torch.manual_seed(0)
    return [torch.randn(sum(LONG_AND_SHORT), heads, head_dim, device="cuda", dtype=dtype)
            for heads in (4, groups, groups, 4)]


def run_backend(name, tensors, dtype, causal, deterministic=False):
    """The output and the gradients of q, k and v."""
    *inputs, weights = (x.to(dtype) for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    head_dim = inputs[0].shape[-1]
    chosen = choose_backend(name, dtype=dtype, head_dim=head_dim, deterministic=deterministic)
    out = chosen.attention(
        *inputs, Segments(LONG_AND_SHORT, device="cuda"), causal=causal, scale=head_dim**-0.5
    )
    return [out.detach(), *gradients(out, inputs, weights)]


def skip_unless_it_runs(name, **case):
    reason = BACKENDS[name].why_not(AttentionCase.here(**case))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", OF_CUDA)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_kernel_equals_the_reference(name, dtype, causal, groups, head_dim):
    skip_unless_it_runs(name, dtype=dtype, head_dim=head_dim)
    tensors = on_gpu(dtype, head_dim, groups)
    got = run_backend(name, tensors, dtype, causal)
    expected = run_backend("sdpa", tensors, torch.float32, causal)
    output, gradient = TOLERANCE[dtype]
    for ours, theirs, most in zip(got, expected, (output, *[gradient] * 3), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, dtype)
        off = (ours.float() - theirs).abs() / (theirs.abs() + theirs.std())
        assert off.max() <= most


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", OF_CUDA)
@pytest.mark.parametrize("causal", [True, False])
def test_a_deterministic_kernel_repeats_every_bit(name, causal, monkeypatch):
    skip_unless_it_runs(name, dtype=torch.bfloat16, head_dim=80, deterministic=True)
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")  # taken back after the test
    torch.use_deterministic_algorithms(True)
    try:
        tensors = on_gpu(torch.bfloat16, 80, 2)
        runs = [run_backend(name, tensors, torch.bfloat16, causal, deterministic=True)
                for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in runs[1:]:
        assert all(map(torch.equal, again, runs[0]))
