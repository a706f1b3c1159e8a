"""The two towers' configurations: what others got wrong, checked."""

from __future__ import annotations

import json

import pytest

from megatron_vl.errors import InputError
from megatron_vl.models import load_spec
from megatron_vl.models.common.recompute import recompute_of
from megatron_vl.parallel import Layout
from megatron_vl.platform import select_platform


@pytest.fixture(scope="module", autouse=True)
def platform():
    select_platform().install()


@pytest.fixture(scope="module")
def model(model_dir):
    return load_spec(model_dir)


def options(**changes):
    from megatron_vl.models.common.transformer_config import ModelOptions

    return ModelOptions(**changes)


def test_an_uneven_first_stage_cannot_touch_the_vision_tower(model):
    from megatron_vl.models.common.transformer_config import language_config
    from megatron_vl.models.qwen2_vl.tower import vision_config

    layout = Layout(pp=2)
    split = model.split(pp=2, first_stage_layers=1)
    language = language_config(model, layout, split, options())
    vision = vision_config(model, layout, split, options())
    assert language.pipeline_model_parallel_layout.get_num_layers_to_build(pp_rank=0) == 1
    assert vision.num_layers == model.vision.depth == 2
    assert vision.num_layers_in_first_pipeline_stage is None
    assert vision.pipeline_model_parallel_layout is None
    assert vision.pipeline_model_parallel_size == 1


def test_sizes_come_from_config_json_alone(model):
    from megatron_vl.models.common.transformer_config import language_config
    from megatron_vl.models.qwen2_vl.tower import vision_config

    language = language_config(model, Layout(), model.split(), options())
    assert (language.num_layers, language.hidden_size, language.ffn_hidden_size) == (4, 64, 96)
    assert (language.num_query_groups, language.layernorm_epsilon) == (2, 1e-6)
    vision = vision_config(model, Layout(), model.split(), options())
    assert vision.normalization == "LayerNorm" and vision.add_qkv_bias
    assert not language.add_bias_linear and language.add_qkv_bias


def test_recompute_is_checked_against_every_stage_and_fitted_to_the_vision_tower(model):
    split = model.split(pp=2, first_stage_layers=1)  # language 1-3, vision 2-0
    with pytest.raises(InputError, match=r"^recompute-num-layers 3 is more than the 1 language"):
        recompute_of(split, granularity="full", method="block", num_layers=3)
    with pytest.raises(InputError, match=r"^recompute-num-layers 3 does not divide the language"):
        recompute_of(split, granularity="full", num_layers=3)
    with pytest.raises(InputError, match=r"^vit-recompute-num-layers 3 is more than the 2 vision"):
        recompute_of(split, granularity="full", method="block", vit_num_layers=3)
    for method, num_layers, fitted in (("block", 3, 2), ("uniform", 4, 2), ("block", 1, 1)):
        whole = recompute_of(
            model.split(), granularity="full", method=method, num_layers=num_layers)
        assert [one.num_layers for one in whole] == [num_layers, fitted]


def test_each_tower_recomputes_what_is_asked_of_it(model):
    from megatron_vl.models.common.transformer_config import language_config
    from megatron_vl.models.qwen2_vl.tower import vision_config

    language, vision = recompute_of(model.split(), granularity="selective", vit_granularity="full")
    chosen = options(recompute=language, vit_recompute=vision)
    made = [build(model, Layout(), model.split(), chosen)
            for build in (language_config, vision_config)]
    assert [one.recompute_granularity for one in made] == ["selective", "full"]
    assert made[1].recompute_method == "uniform" and made[1].recompute_num_layers == 1


def test_an_unknown_vision_activation_is_named(model):
    from dataclasses import replace

    from megatron_vl.models.qwen2_vl.tower import vision_config

    strange = replace(model, vision=replace(model.vision, activation="swish9"))
    with pytest.raises(InputError, match="'swish9'; known are"):
        vision_config(strange, Layout(), strange.split(), options())


def test_a_rope_that_is_not_the_published_one_is_refused(model_dir, tmp_path):
    config = json.loads((model_dir / "config.json").read_text())
    config["rope_scaling"] = {**config["rope_scaling"], "type": "yarn", "factor": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="type of rope_scaling .* is 'yarn'"):
        load_spec(tmp_path)


def test_layers_of_one_tower_may_differ(model):
    import torch
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_vl.models.common.core_attention import SegmentParams
    from megatron_vl.models.common.layer_spec import LayerKind, block_spec
    from megatron_vl.models.qwen2_vl.tower import vision_config
    from megatron_vl.ops.norm import TorchNorm
    from megatron_vl.ops.rotary import Rotary
    from megatron_vl.ops.segments import Segments

    config = vision_config(model, Layout(), model.split(), options())
    made = block_spec([LayerKind(causal=False, windowed=True), LayerKind(causal=False),
                       LayerKind(causal=False, qk_norm=True)])
    parts = [spec.submodules.self_attention.submodules for spec in made.layer_specs]
    assert [part.q_layernorm for part in parts] == [IdentityOp, IdentityOp, TorchNorm]
    heads, width = config.num_attention_heads, config.kv_channels
    q, k, v = torch.randn(3, 8, 1, heads, width).unbind()
    rotary = Rotary.of(torch.zeros(8, 1, 1, width // 2), torch.float32)

    def attended(part, **where):
        module = part.core_attention(config, 1, AttnMaskType.no_mask, "self")
        return module(q, k, v, None, packed_seq_params=SegmentParams(rotary=rotary, **where))

    whole, halves = Segments([8], device="cpu"), Segments([4, 4], device="cpu")
    windowed, full, _ = (attended(part, segments=whole, windows=halves) for part in parts)
    assert torch.equal(windowed, attended(parts[1], segments=halves))
    assert torch.equal(full, attended(parts[1], segments=whole))
    assert not torch.equal(windowed, full)
