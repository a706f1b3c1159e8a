"""--tp-comm-overlap up to what TransformerEngine is told; what it does there needs GPUs."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_vl.errors import InputError
from megatron_vl.models.common.patch_tower import tower_config
from megatron_vl.models.common.transformer_config import language_config
from megatron_vl.platform import select_platform
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.options.tp_overlap import TpOverlapOptions
from megatron_vl.training.plan import plan_run
from megatron_vl.training.setup import make_user_buffers, model_options

ON = dict(tp_comm_overlap=True)
WORKS = ON | dict(tensor_model_parallel_size=2, sequence_parallel=True, bf16=True)
REFUSED = {
    "TP 1": (dict(WORKS, tensor_model_parallel_size=1), "TP is 1; give TP"),
    "no SP": (dict(WORKS, sequence_parallel=False), "add sequence-parallel, or leave it out"),
    "rows of several lengths": (dict(WORKS, packing_buffer_size=0), "needs rows of one length"),
    "fp32": (dict(WORKS, bf16=False), "is for bf16 and fp16, and this is float32"),
    "nf4": (dict(WORKS, lora_rank=2, quantize_base="nf4"), "leave out quantize-base"),
    "no overlap": (dict(tp_comm_overlap_ag=False), "tp-comm-overlap-ag says how tp-comm-overlap"),
    "another option": (dict(WORKS, disable_tp_comm_overlap_rs=True), "no-tp-comm-overlap-rs"),
    "an option of old": (dict(WORKS, tp_comm_split_ag=True), "TransformerEngine has left it"),
}


def plan_of(model_dir, *, here: bool = False, **options):
    config = TrainConfig.from_dict(
        dict(hf_config=str(model_dir), train_data_path="DATA", global_batch_size=2,
             micro_batch_size=2, seq_length=256) | options)
    return plan_run(config, config.parallel.layout_size, here=here)


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_user_buffers_cannot_serve_is_refused_by_name(options, sentence, model_dir):
    with pytest.raises(InputError) as refused:
        plan_of(model_dir, **options)
    assert sentence in str(refused.value)


def test_a_machine_without_transformer_engine_refuses_it_before_any_start(model_dir):
    with pytest.raises(InputError, match="tp-comm-overlap needs TransformerEngine on a CUDA device "
                       "and this machine has none; use sequence-parallel alone"):
        plan_of(model_dir, here=True, **WORKS)


@pytest.mark.parametrize(("text", "sentence"), [
    ("qkv_fprop: {method: ring_exchange, num_splits: 4}\n", None),
    ("qkv: {method: bulk}\n", "has 'qkv', which is no product of a layer; use fc1_dgrad"),
    ("qkv_fprop: bulk\n", "cannot be used"),
    (None, "is missing"),
])
def test_a_file_of_settings_names_products(text, sentence, tmp_path):
    path = tmp_path / "buffers.yaml"
    if text is not None:
        path.write_text(text)
    options = TpOverlapOptions(tp_comm_overlap=True, tp_comm_overlap_cfg=str(path))
    if sentence is None:
        assert options.settings() == {"qkv_fprop": {"method": "ring_exchange", "num_splits": 4}}
        return
    with pytest.raises(InputError, match=sentence):
        options.settings()


def test_the_language_layers_overlap_and_the_towers_do_not(model_dir):
    platform = select_platform()
    platform.install()
    plan = plan_of(model_dir, **WORKS, tp_comm_overlap_ag=False, tp_comm_overlap_disable_fc1=True)
    options = model_options(plan, platform, initialize_weights=False)
    language, tower = (make(plan.spec, plan.layout, plan.split, options)
                       for make in (language_config, tower_config))
    assert language.tp_comm_overlap and language.tp_comm_overlap_disable_fc1
    assert not language.tp_comm_overlap_ag and language.tp_comm_overlap_rs
    assert not tower.tp_comm_overlap


def initialize_ub(shape, tp_size, use_fp8=False, quantization_modes=None, dtype=torch.bfloat16,
                  ub_cfgs=None, bootstrap_backend=None):
    """With the signature of TransformerEngine's, 2.9 to 2.11."""


@pytest.mark.parametrize(("fails", "options", "shape"), [
    (False, {}, [512, 64]), (False, dict(context_parallel_size=2), [256, 64]), (True, {}, None)])
def test_transformer_engine_is_asked_for_buffers_of_a_microbatch(
    fails, options, shape, model_dir, monkeypatch
):
    given = {}

    def recorded(*args, **kwargs):
        if fails:
            raise RuntimeError("no CUDA Multicast")
        given.update(inspect.signature(initialize_ub).bind(*args, **kwargs).arguments)

    engine = ModuleType("transformer_engine.pytorch.module")
    engine.base = SimpleNamespace(
        initialize_ub=recorded, UserBufferQuantizationMode=SimpleNamespace(FP8="fp8", NONE="none"))
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    plan = plan_of(model_dir, **WORKS, **options)
    if fails:
        with pytest.raises(InputError, match="tp-comm-overlap cannot have .*no CUDA Multicast"):
            make_user_buffers(plan)
        return
    make_user_buffers(plan)
    assert given == dict(shape=shape, tp_size=2, dtype=torch.bfloat16, quantization_modes=["none"],
                         ub_cfgs=None, bootstrap_backend="nccl")
