"""The CPU platform gives Megatron-Core what it needs, and nobody else anything to notice."""

from __future__ import annotations

import ast
import sys
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT, run

from megatron_vl.platform import select_platform
from megatron_vl.platform.base import Platform

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU layer is not installed")


@pytest.fixture(scope="module", autouse=True)
def platform():
    chosen = select_platform()
    chosen.install()
    chosen.install()  # twice is once
    return chosen


def test_without_cuda_the_cpu_platform_is_chosen_whatever_torch_was_built_for(monkeypatch):
    for built_for in (None, "12.8"):
        monkeypatch.setattr(torch.version, "cuda", built_for)
        assert select_platform().name == "cpu"
        assert isinstance(select_platform(), Platform)


def test_importing_leaves_torch_as_it_was():
    code = (
        "import torch; before = (torch.zeros, torch.Tensor.type, torch.cuda.current_device);"
        "import megatron_vl.platform, megatron_vl.models, megatron_vl.weights;"
        "assert before == (torch.zeros, torch.Tensor.type, torch.cuda.current_device)"
    )
    assert run([sys.executable, "-c", code]).code == 0


def test_cuda_factories_and_moves_land_on_the_cpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1], device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.ones(1).cuda().to("cuda:0").to(device="cuda").device.type == "cpu"
    assert not torch.cuda.is_available()


def test_a_device_context_still_decides_where_tensors_are_made():
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
        assert torch.arange(3).device.type == "meta"


def test_transformers_still_fills_every_buffer(hf_dir):
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(hf_dir)
    inv_freq = model.model.language_model.rotary_emb.inv_freq
    width = 2 * inv_freq.numel()
    expected = 1.0 / 1e6 ** (torch.arange(0, width, 2) / width)
    assert torch.allclose(inv_freq, expected)


def test_only_megatron_core_sees_cuda_type_names():
    tensor = torch.zeros(1)
    assert tensor.type() == "torch.FloatTensor"
    inside = {"__name__": "megatron.core.somewhere", "tensor": tensor}
    assert eval("tensor.type()", inside) == "torch.cuda.FloatTensor"
    assert tensor.type(torch.int64).dtype == torch.int64


def test_random_state_is_one_generator_and_seeding_ends():
    torch.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.cuda.manual_seed(7)
    assert torch.equal(torch.rand(3), first)


def test_the_group_step_adam_equals_torchs_adamw():
    from megatron_vl.platform.optimizer import GroupStepAdam

    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(50)) for _ in range(2))
    options = dict(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    adam, adamw = GroupStepAdam([ours], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(50)
        adam.step()
        adamw.step()
    assert torch.allclose(ours, theirs, rtol=1e-6)
    assert adam.param_groups[0]["step"] == 5 and set(adam.state[ours]) == {"exp_avg", "exp_avg_sq"}


def test_a_step_counted_once_updates_parameters_that_are_many_and_of_any_shape():
    from megatron_vl.platform.optimizer import GroupStepAdam

    torch.manual_seed(0)
    shapes = [(3,), (2, 5), (1,), ()]
    start = [torch.randn(shape) for shape in shapes]
    found = []
    for make in (GroupStepAdam, torch.optim.AdamW):
        weights = [torch.nn.Parameter(one.clone()) for one in start]
        optimizer = make([{"params": weights[:2]}, {"params": weights[2:], "lr": 0.01}],
                         lr=0.1, weight_decay=0.1)
        for step in range(4):
            torch.manual_seed(step)
            for weight in weights:
                weight.grad = torch.randn(weight.shape)
            optimizer.step()
        found.append(weights)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", [0.5, 8.0])
def test_gradients_clipped_in_the_step_are_those_that_megatron_core_clips(norm, monkeypatch):
    from megatron_vl.platform.optimizer import GroupStepAdam, clip

    torch.manual_seed(0)
    gradients = [torch.randn(500) for _ in range(2)]
    found = []
    for clips_in_step in (False, True):
        weight = torch.nn.Parameter(torch.ones(500))
        adam = GroupStepAdam([weight], lr=0.1, eps=1e-3)  # so large that a factor matters
        monkeypatch.setattr(GroupStepAdam, "clips_in_step", clips_in_step)
        one = SimpleNamespace(
            optimizer=adam, get_parameters=lambda weight=weight: [weight], config=SimpleNamespace(
                clip_grad=1.0, use_precision_aware_optimizer_no_fp8_or_ds_fp8=False))
        for number, gradient in enumerate(gradients):
            weight.grad = gradient.clone()
            if number == 0:  # what it left does not reach the step after it
                clip(one, norm)
            adam.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_the_norm_and_the_scaling_are_those_of_megatron_core():
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    from megatron_vl.platform.optimizer import l2_norm, scale

    norm = clip_grads.l2_norm_impl
    assert norm.func is l2_norm and norm.keywords == {"dtype": torch.float64}
    assert clip_grads.multi_tensor_scale_impl is scale
    torch.manual_seed(0)
    tensors = [torch.randn(7), torch.randn(2, 3), torch.randn(1)]
    ours, _ = l2_norm(0, None, [tensors], False)
    theirs, _ = local_multi_tensor_l2_norm(0, None, [tensors], False)
    torch.testing.assert_close(ours, theirs)
    many = torch.randn(4_000_000)  # as of an embedding: one by one in fp32, 2e-4 of them are lost
    ours, _ = l2_norm(0, None, [[many]], False)
    torch.testing.assert_close(ours, many.double().norm().float().view(1), rtol=1e-6, atol=0)
    copies = [one.clone() for one in tensors]
    scale(0, None, [tensors, tensors], 0.3)
    local_multi_tensor_scale(0, None, [copies, copies], 0.3)
    for one, other in zip(tensors, copies, strict=True):
        torch.testing.assert_close(one, other)


def test_a_weight_gradient_is_added_to_the_buffer_by_its_own_product():
    from megatron_vl.platform.weight_gradient import AddedByTorch

    torch.manual_seed(0)
    x, gradient, buffer = torch.randn(6, 3), torch.randn(6, 4), torch.randn(4, 3)
    want = buffer + gradient.t() @ x
    AddedByTorch.wgrad_gemm_accum_fp32(x, gradient, buffer)
    torch.testing.assert_close(buffer, want)


CUDA_INSTALL = """
import sys
from megatron_vl.platform.cuda import CudaPlatform
from megatron_vl.platform.optimizer import GroupStepAdam
CudaPlatform().install()
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel import layers
import torch
assert layers._grad_accum_fusion_available
print(optimizer.Adam is GroupStepAdam and GroupStepAdam.clips_in_step,
      distrib_optimizer.HAVE_APEX_OR_TE, torch._dynamo.config.recompile_limit)
"""


@pytest.mark.parametrize("found", [None, "apex"])
def test_a_gpu_without_transformer_engine_gets_the_optimizer_that_resumes(found, tmp_path):
    if found is not None:  # a package of that name, in which Megatron-Core finds what it wants
        (tmp_path / found / "optimizers").mkdir(parents=True)
        (tmp_path / found / "__init__.py").touch()
        (tmp_path / found / "optimizers/__init__.py").write_text("FusedAdam = FusedSGD = object")
    done = run([sys.executable, "-W", "ignore", "-c", CUDA_INSTALL],
               PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.code == 0, done.text
    assert done.out.split() == [str(found is None), "True", "64"]


def replaced(folder) -> list[tuple[str, str]]:
    """(module of Megatron-Core, name in it) of what the platform's files assign to."""
    found = []
    for path in sorted(folder.glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        modules = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in nodes if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names if node.module.startswith("megatron.core")
        }
        found += [
            (modules[target.value.id], target.attr)
            for node in nodes if isinstance(node, ast.Assign) for target in node.targets
            if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) in modules
        ]
    return found


def test_what_is_replaced_in_megatron_core_is_there():
    """Of a release that has renamed it, its own would go on working instead, and nobody know."""
    names = replaced(ROOT / "megatron_vl/platform")
    assert len(names) > 10
    code = f"""
import importlib
from megatron_vl.platform.stand_in import import_megatron_core
import_megatron_core()
print([one for one in {names} if not hasattr(importlib.import_module(one[0]), one[1])])
"""
    done = run([sys.executable, "-W", "ignore", "-c", code])
    absent = set(ast.literal_eval(done.out))
    # One release has it and another has not, which the platform asks before it replaces it.
    absent -= {("megatron.core.tensor_parallel.random", "_get_share_storage"),
               ("megatron.core.transformer.moe.moe_utils", "te_general_gemm")}
    # Apex's alone, beside a name that says whether it is there.
    assert absent == {("megatron.core.tensor_parallel.layers", "fused_weight_gradient_mlp_cuda")}


LEAVE = """
import gc, os
from megatron.core import parallel_state
from megatron_vl.parallel import Layout
from megatron_vl.platform import initialize, leave_layout

def threads():
    return len(os.listdir("/proc/self/task"))

gc.disable()
initialize(Layout())
leave_layout()
before = threads()
initialize(Layout())
model = [parallel_state.get_data_parallel_group(), parallel_state.get_tensor_model_parallel_group()]
model.append(model)
del model
leave_layout()
assert threads() == before, (before, threads())
"""


def test_the_world_is_bound_to_no_device():
    """With a device NCCL splits it for every group: those of some ranks would wait for ever."""
    done = run([sys.executable, "-W", "ignore", "-c", """
from megatron_vl.platform import connect, select_platform
select_platform().install()
connect()
from torch.distributed import distributed_c10d
assert distributed_c10d._get_default_group().bound_device_id is None
"""])
    assert done.code == 0, done.text


def test_the_threads_of_a_layout_that_was_left_end():
    """Though its model refers to itself."""
    done = run([sys.executable, "-W", "ignore", "-c", "from megatron_vl.platform import "
                "select_platform; select_platform().install()\n" + LEAVE])
    assert done.code == 0, done.text
