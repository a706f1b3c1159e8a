"""Qwen2-VL's config.json in both forms, the published sizes, and the names the map gives."""

import json
import re
from dataclasses import replace

import pytest
from true_sizes import PARAMETERS, SIZES, published

from megatron_vl.errors import InputError
from megatron_vl.models import family, known_families, load_spec
from megatron_vl.parallel import Layout, StageSplit
from megatron_vl.weights import Weight, WeightMap, make_plan
from megatron_vl.weights.map import LAST
from megatron_vl.weights.rules import Copy


def nested(size: str) -> dict:
    """The same model as transformers 5 writes it."""
    flat = published(size)
    top = ("architectures", "model_type", "vision_config", "vision_start_token_id",
           "vision_end_token_id", "image_token_id", "video_token_id", "tie_word_embeddings")
    text = {key: value for key, value in flat.items() if key not in top}
    rope = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta"),
                                       "rope_type": "default"}
    text |= {"model_type": "qwen2_vl_text", "rope_parameters": rope,
             "dtype": text.pop("torch_dtype")}
    config = {key: flat[key] for key in top}
    config["vision_config"] = {**flat["vision_config"], "model_type": "qwen2_vl_vision",
                               "hidden_act": "quick_gelu", "in_channels": 3}
    return config | {"text_config": text, "dtype": "bfloat16"}


def write(tmp_path, config) -> object:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("size", SIZES["qwen2_vl"])
@pytest.mark.parametrize("form", [published, nested])
def test_published_sizes_come_out_of_either_form_of_config_json(size, form, tmp_path):
    spec = load_spec(write(tmp_path, form(size)))
    decoder, vision = spec.decoder, spec.vision
    assert (
        decoder.num_layers, decoder.hidden_size, decoder.num_attention_heads,
        decoder.num_query_groups, decoder.ffn_hidden_size, decoder.vocab_size,
        decoder.tie_word_embeddings, decoder.norm_eps,
    ) == SIZES["qwen2_vl"][size]
    assert (decoder.head_dim, decoder.rope_theta, decoder.rope_sections) == (128, 1e6, (16, 24, 24))
    assert decoder.qkv_bias and decoder.init_std == 0.02
    assert (vision.depth, vision.hidden_size, vision.num_heads, vision.ffn_hidden_size) == (
        32, 1280, 16, 5120)
    assert (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size) == (14, 2, 2)
    assert (vision.activation, vision.norm_eps, vision.merged_size) == ("quick_gelu", 1e-6, 5120)
    assert (vision.head_dim, vision.patch_dim) == (80, 1176)
    assert vision.out_hidden_size == decoder.hidden_size
    tokens = spec.tokens
    assert (tokens.vision_start, tokens.vision_end, tokens.image, tokens.video) == (
        151652, 151653, 151655, 151656)
    assert (spec.dtype, spec.model_type) == ("bfloat16", "qwen2_vl")
    family("qwen2_vl").check_size(spec, size)
    family("qwen2_vl").check_size(spec, "auto")


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in SIZES for size in SIZES[name]])
def test_the_map_holds_every_parameter_of_the_published_sizes(name, size, tmp_path):
    spec = load_spec(write(tmp_path, published(size, name)))
    inventory = family(name).weight_map(spec).hf_inventory()
    assert sum(stored.numel for stored in inventory) == PARAMETERS[name][size]


def test_published_names_and_megatron_names_are_the_ecosystems(tmp_path):
    spec = load_spec(write(tmp_path, published("2B")))
    weights = family("qwen2_vl").weight_map(spec)
    keys = weights.published()
    assert keys["visual.patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    assert keys["visual.blocks.31.attn.qkv.weight"] == (3840, 1280)
    assert keys["visual.merger.mlp.2.weight"] == (1536, 5120)
    assert keys["model.layers.27.self_attn.k_proj.bias"] == (256,)
    assert "lm_head.weight" not in keys
    stored = {one.name: one.shape
              for one in weights.mcore_inventory(split=spec.split(), layout=Layout())}
    layer = "language_model.decoder.layers.27."
    assert stored[layer + "self_attention.linear_qkv.weight"] == (2048, 1536)
    assert stored[layer + "mlp.linear_fc1.weight"] == (17920, 1536)
    assert stored[layer + "mlp.linear_fc2.weight"] == (1536, 8960)
    assert stored["vision_model.projection.encoder.linear_fc1.bias"] == (5120,)
    assert stored["vision_model.decoder.layers.31.mlp.linear_fc1.layer_norm_bias"] == (1280,)
    assert stored["language_model.embedding.word_embeddings.weight"] == (151936, 1536)
    assert "language_model.output_layer.weight" not in stored


def test_both_generations_of_key_names_are_the_same_keys(tmp_path):
    weights = family("qwen2_vl").weight_map(load_spec(write(tmp_path, published("2B"))))
    name = weights.published_name
    assert name("model.language_model.layers.0.mlp.up_proj.weight") == (
        "model.layers.0.mlp.up_proj.weight")
    assert name("model.visual.blocks.0.norm1.bias") == "visual.blocks.0.norm1.bias"
    assert name("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert name("lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize("tp, pp, first", [(1, 2, 10), (4, 2, None), (2, 3, 2), (1, 1, None)])
def test_the_uneven_first_stage_never_cuts_the_vision_tower(tp, pp, first, tmp_path):
    spec = load_spec(write(tmp_path, published("2B")))
    split = spec.split(pp=pp, first_stage_layers=first)
    spec.check_layout(Layout(tp=tp, pp=pp), split)
    stored = family("qwen2_vl").weight_map(spec).mcore_inventory(
        split=split, layout=Layout(tp=tp, pp=pp))
    layers = {(one.file, match[1]) for one in stored
              if (match := re.match(r"vision_model\.decoder\.layers\.(\d+)\.", one.name))}
    assert len(layers) == 32 * tp
    assert {file.split("/")[0][10:] for file, _ in layers} == {"_000" if pp > 1 else ""}


def test_a_tied_model_keeps_a_copy_of_the_embedding_where_logits_are_made(tmp_path):
    spec = load_spec(write(tmp_path, published("2B")))
    weights = family("qwen2_vl").weight_map(spec)
    for llm, vit, copies in (([14, 14], [32, 0], 1), ([0, 28], [30, 2], 0), ([28], [32], 0)):
        split = StageSplit.create(layers={"vit": 32, "llm": 28}, pp=len(llm), llm=llm, vit=vit)
        names = [one.name for one in weights.mcore_inventory(
            split=split, layout=Layout(pp=split.pp))]
        assert names.count("language_model.output_layer.weight") == copies
        assert names.count("language_model.embedding.word_embeddings.weight") == 1


@pytest.mark.parametrize("change, names", [
    ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
    ({"hidden_size": "big"}, "hidden_size is 'big'"),
    ({"vision_config": None}, "vision_config is missing"),
    ({"rope_scaling": None}, "mrope_section is missing"),
    ({"rope_scaling": {"mrope_section": [16, 24, 23]}}, "half of the head width"),
    ({"model_type": "qwen9_vl"}, r"known are: .*qwen2_vl"),
    ({"model_type": None}, "known are|no model_type"),
    ({"num_key_value_heads": 5}, "multiple of the second"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"torch_dtype": "int8"}, "int8"),
    ({"image_token_id": None}, "image_token_id is missing"),
])
def test_an_unusable_config_json_is_refused_by_file_and_key(change, names, tmp_path):
    config = {key: value for key, value in (published("2B") | change).items() if value is not None}
    with pytest.raises(InputError, match=names) as caught:
        load_spec(write(tmp_path, config))
    assert "config.json" in str(caught.value)


def test_a_missing_directory_file_or_broken_json_is_refused_by_path(tmp_path):
    with pytest.raises(InputError, match="not a directory"):
        load_spec(tmp_path / "none")
    with pytest.raises(InputError, match="has no config.json"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"cannot be used \(it is \[\]: it must be a table\)"):
        load_spec(tmp_path)


@pytest.mark.parametrize(("tp", "names"), [(3, "8960 ffn width"), (5, "12 attention heads"),
                                           (8, "12 attention heads")])
def test_tensor_parallelism_that_does_not_fit_the_model_is_refused(tp, names, tmp_path):
    spec = load_spec(write(tmp_path, published("2B")))
    with pytest.raises(InputError, match=f"TP {tp} does not divide the model's {names}"):
        spec.check_layout(Layout(tp=tp), spec.split())


def test_a_vision_tower_that_is_not_cut_need_not_be_divisible(tmp_path):
    spec = load_spec(write(tmp_path, published("2B")))
    spec = replace(spec, vision=replace(spec.vision, num_heads=10))
    with pytest.raises(InputError, match="TP 4 does not divide the model's 10 vision attention"):
        spec.check_layout(Layout(tp=4), spec.split())
    spec.check_layout(Layout(tp=4, vit_data_parallel=True), spec.split())


def test_more_tp_ranks_than_key_value_heads_are_allowed_where_megatron_core_gathers(tmp_path):
    spec = load_spec(write(tmp_path, published("72B")))
    spec.check_layout(Layout(tp=16), spec.split())
    stored = family("qwen2_vl").weight_map(spec).mcore_inventory(
        split=spec.split(), layout=Layout(tp=16))
    qkv = [one for one in stored if one.name.endswith("layers.0.self_attention.linear_qkv.weight")
           and one.name.startswith("language")]
    assert {one.shape for one in qkv} == {((64 + 16) * 128 // 16, 8192)}


def test_a_split_for_another_layout_or_model_is_refused(tmp_path):
    spec = load_spec(write(tmp_path, published("2B")))
    with pytest.raises(InputError, match="the layout is PP 4"):
        spec.check_layout(Layout(pp=4), spec.split(pp=2))
    other = StageSplit.create(layers={"vit": 32, "llm": 26}, pp=2)
    with pytest.raises(InputError, match="holds 26 language layers"):
        spec.check_layout(Layout(pp=2), other)


def test_a_size_that_disagrees_with_config_json_is_refused(tmp_path):
    spec = load_spec(write(tmp_path, published("7B")))
    with pytest.raises(InputError, match="model-size is 2B, which has 28 layers of width 1536.*7B"):
        family("qwen2_vl").check_size(spec, "2B")
    with pytest.raises(InputError, match="one of 2B, 7B, 72B or auto"):
        family("qwen2_vl").check_size(spec, "3B")
    spec, experts = load_spec(write(tmp_path, published("235B-A22B", "qwen3_vl_moe"))), family(
        "qwen3_vl_moe")
    experts.check_size(spec, "A22B")
    with pytest.raises(InputError, match="model-size is A3B.*but.*94 of width 4096; use 235B-A22B"):
        experts.check_size(spec, "A3B")


def test_collisions_in_a_map_are_refused_by_name():
    def weight(name, key):
        return Weight(place=LAST, name=name, rule=Copy(key=key, shape=(2,)))

    sizes = {"source": "x.py", "layers": {"vit": 1, "llm": 1}}
    with pytest.raises(InputError, match="a.weight appears twice"):
        WeightMap(weights=(weight("a.weight", "k"), weight("a.weight", "l")), **sizes)
    with pytest.raises(InputError, match="k appears twice"):
        WeightMap(weights=(weight("a.weight", "k"), weight("b.weight", "k")), **sizes)


def test_a_plan_for_72b_needs_config_json_alone_and_covers_every_element(tmp_path):
    spec = load_spec(write(tmp_path, published("72B")))
    weights = family("qwen2_vl").weight_map(spec)
    split = spec.split(pp=4, first_stage_layers=17)
    target = weights.mcore_inventory(split=split, layout=Layout(tp=8, pp=4))
    plan = make_plan(weights.hf_inventory(), target)
    assert len(plan.tensors) == len(target)
    assert all(one.zeros == 0 for one in plan.tensors)
    back = make_plan(target, weights.hf_inventory())
    assert sum(one.target.numel for one in back.tensors) == PARAMETERS["qwen2_vl"]["72B"]


def test_known_families_are_listed():
    assert "qwen2_vl" in known_families()
