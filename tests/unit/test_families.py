"""Whatever a family's folder is to give, for every family there is."""

from __future__ import annotations

import json
import re

import pytest
import torch
from commands import megatron_vl
from true_sizes import COUNTED, counted

from megatron_vl.errors import InputError
from megatron_vl.models import family, known_families, load_spec
from megatron_vl.models.registry import read_config_json
from megatron_vl.parallel import Layout
from megatron_vl.training.checkpoint.same_model import check_same_model

TINY = {"baichuan": "baichuan_model_dir", "qwen": "resampler_model_dir", "qwen2": "text_model_dir",
        "qwen2_5_vl": "window_model_dir", "qwen2_vl": "model_dir", "qwen3": "qk_norm_model_dir",
        "qwen3_moe": "experts_model_dir", "qwen3_vl": "deepstack_model_dir",
        "qwen3_vl_moe": "deepstack_experts_model_dir"}

@pytest.fixture(params=sorted(TINY))
def tiny(request):
    return request.getfixturevalue(TINY[request.param])


def test_every_family_is_tried_here():
    assert known_families() == sorted(TINY)


@pytest.mark.parametrize("layout", [("--tp", 2, "--pp", 2), ("--pp", 2, "--vp", 2),
                                    ("--format", "torch_dist")])
def test_weights_go_out_and_come_home_bit_by_bit(tiny, layout, tmp_path):
    ours, home = tmp_path / "ours", tmp_path / "home"
    assert megatron_vl("convert", tiny, ours, *layout).code == 0
    done = megatron_vl("convert", ours, home, "--to", "hf", "--hf-config", tiny)
    assert done.code == 0 and "warning" not in done.text, done.text
    done = megatron_vl("verify", tiny, home)
    assert done.code == 0, done.text
    model = family(load_spec(tiny).model_type).judge().from_pretrained(home)
    assert model.config.model_type == read_config_json(tiny)["model_type"]


def test_a_sample_has_a_position_on_every_axis(tiny):
    spec = load_spec(tiny)
    positions = family(spec.model_type).positions(spec)
    made = positions(torch.zeros(7, dtype=torch.int64), [])
    assert made.dtype == torch.int64 and made.shape == (positions.axes, 7)
    assert positions.axes == len(spec.decoder.rope_sections)
    assert torch.equal(made, torch.arange(7).expand(positions.axes, 7))


@pytest.mark.parametrize(("name", "size"), COUNTED)
def test_a_published_size_is_counted_right(name, size, request, tmp_path):
    config = counted(request.getfixturevalue(TINY[name]), name, size)
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_spec(tmp_path)
    family(name).check_size(spec, size)
    numbers = sum(family(name).weight_map(spec).counts().values())
    assert round(numbers / 1e9, 3) == COUNTED[name, size][2]
    tp, pp = 4 if COUNTED[name, size][0][2] % 8 else 8, 4  # 8 does not divide an ffn of 3420
    if spec.decoder.experts is not None:
        tp, pp = 2, 2  # each rank has every expert, and each expert its lines
    done = megatron_vl("convert", tmp_path, tmp_path / "out", "--tp", tp, "--pp", pp, "--dry-run")
    assert done.code == 0, done.text


VISION_OPTIONS = [
    ("--freeze-vit", "freeze-vit is true, but qwen2 takes text alone; leave it out."),
    ("--vit-lr", "vit-lr is 0.1, but qwen2 takes text alone; leave it out."),
    ("--image-max-pixels", "image-max-pixels is 1, but qwen2 takes text alone; leave it out."),
    ("--vit-pp-layers", "vit-pp-layers is 1,1, but qwen2 takes text alone; leave it out."),
    ("--train-constants", "train-constants is true, but qwen2 has no constant weight; leave it "
                          "out."),
    ("--freeze-llm", "freeze-llm leaves nothing to train of qwen2, which is a language model "
                     "alone; leave it out."),
]


@pytest.mark.parametrize(("option", "says"), VISION_OPTIONS)
def test_a_text_model_refuses_what_is_about_vision(option, says, text_model_dir):
    values = {"--vit-lr": ["0.1"], "--image-max-pixels": ["1"], "--vit-pp-layers": ["1,1"]}
    done = megatron_vl("train", "--load", text_model_dir, "--train-data-path", "none", option,
                       *values.get(option, []), "--train-iters", 1, "--dry-run")
    assert (done.code, done.err) == (2, f"megatron-vl train: {says}\n"), done.text


CONFIGS = [  # what config.json of a text model has, and what is said of it
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is set"),
    ({"rope_scaling": {"factor": 4.0}}, "rope_scaling is set"),
    ({"layer_types": ["full_attention", "sliding_attention"]},
     "layer_types has full_attention, sliding_attention; only full_attention is supported"),
    ({"use_sliding_window": True}, "use_sliding_window is true"),
    ({"head_dim": 64}, "head_dim is 64, but hidden_size 64 over 4 heads is 16"),
    ({"num_attention_heads": 64, "num_key_value_heads": 64}, "the heads are 1 wide"),
    ({"vision_config": {}}, "model_type is qwen2, a language model alone, but there is a vision"),
]


BAICHUAN = [
    ({"quantization_config": {"load_in_4bit": True}}, "its weights are quantised"),
    ({"max_position_embeddings": None}, "as in Baichuan2-13B, whose attention has ALiBi"),
    ({"vocab_size": 64000}, "as of Baichuan-7B and Baichuan-13B; only Baichuan2-7B is supported"),
    ({"z_loss_weight": 0.1}, "z_loss_weight is 0.1"),
    ({"num_key_value_heads": 2}, "num_key_value_heads is 2, but every one of the 4 heads"),
    ({"tie_word_embeddings": True}, "a normalised head is no copy of the embedding"),
]
QWEN3 = [
    ({"head_dim": None}, "head_dim is missing"),
    ({"head_dim": 7}, "the heads are 7 wide"),
    ({"attention_bias": True}, "attention_bias is true"),
]
EXPERTS = [
    ({"num_experts": None}, "num_experts is missing"),
    ({"num_experts_per_tok": 5}, "sends a token to 5 experts but has 4"),
    ({"num_experts_per_tok": 1}, "so that nothing trains the router"),
    ({"mlp_only_layers": [0, 2]}, "mlp_only_layers is [0, 2], which gives some"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2, which gives some layers"),
    ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef is -0.1"),
]
DEEPSTACK = [
    ({"vision_config": {"deepstack_visual_indexes": None}}, "deepstack_visual_indexes is missing"),
    ({"vision_config": {"deepstack_visual_indexes": []}}, "is []; it must name layers"),
    ({"vision_config": {"deepstack_visual_indexes": [1, 4]}}, "is [1, 4]; it must name layers of "
                                                             "the tower, from 0 to 3, in asc"),
    ({"vision_config": {"deepstack_visual_indexes": [2, 1]}}, "is [2, 1]; it must name layers of"),
    ({"vision_config": {"num_position_embeddings": 60}}, "is 60; it must be a square"),
    ({"vision_config": {"num_heads": 32}}, "vision heads are 2 wide; positions of rows and"),
    ({"text_config": {"num_hidden_layers": 2}}, "hands features to 3 language layers, but there "
                                                "are 2"),
    ({"text_config": {"rope_scaling": {"mrope_section": [6, 5, 5], "mrope_interleaved": False}}},
     "mrope_interleaved of rope_scaling (or rope_parameters) is false"),
    ({"text_config": {"rope_scaling": {"mrope_section": [4, 6, 6]}}}, "leaves too few of the 16"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
     "has a quantization_config (fp8): its weights are quantised"),
    ({"model_type": "qwen3_omni"}, "model_type 'qwen3_omni' is not supported"),
    ({"model_type": "qwen3_vl_moe"}, "num_experts is missing"),
]
DEEPSTACK_EXPERTS = [
    ({"vision_config": {"deepstack_visual_indexes": None}}, "deepstack_visual_indexes is missing"),
    ({"text_config": {"num_experts": None}}, "num_experts is missing"),
    ({"text_config": {"norm_topk_prob": False}}, "norm_topk_prob is false; no model of this type"),
    ({"text_config": {"mlp_only_layers": [1]}}, "mlp_only_layers is [1], which gives some"),
]
REFUSED = [
    (model, *row) for model, rows in (
        ("text_model_dir", CONFIGS), ("baichuan_model_dir", BAICHUAN),
        ("qk_norm_model_dir", QWEN3), ("experts_model_dir", EXPERTS),
        ("deepstack_model_dir", DEEPSTACK),
        ("deepstack_experts_model_dir", DEEPSTACK_EXPERTS),
    ) for row in rows
]


@pytest.mark.parametrize(("model", "keys", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_a_model_that_is_not_understood_is_refused(model, keys, says, request, tmp_path):
    config = read_config_json(request.getfixturevalue(model))
    keys = {key: config[key] | value if isinstance(config.get(key), dict) else value
            for key, value in keys.items()}
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    done = megatron_vl("convert", tmp_path, tmp_path / "out", "--dry-run")
    assert done.code == 2 and says in done.err and "Traceback" not in done.err, done.text


def test_what_is_plain_rope_is_taken(text_model_dir, tmp_path):
    config = read_config_json(text_model_dir)
    for plain in ({"rope_scaling": None}, {"rope_scaling": {"rope_type": "default"}},
                  {"rope_theta": None, "rope_parameters": {"rope_type": "default",
                                                           "rope_theta": 1e6}}):
        (tmp_path / "config.json").write_text(json.dumps(config | plain))
        assert load_spec(tmp_path) == load_spec(text_model_dir)


def test_a_number_of_experts_has_two_names(experts_model_dir, tmp_path):
    """The published one, and the one that transformers 5 writes."""
    config = read_config_json(experts_model_dir)
    config["num_local_experts"] = config.pop("num_experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_spec(tmp_path) == load_spec(experts_model_dir)


def test_experts_are_divided_over_ranks_that_divide_their_tokens(
    experts_model_dir, text_wds_dir, tmp_path
):
    says = "TP 2 would send every token to the experts of qwen3_moe 2 times; add --sequence-paral"
    given = ["--train-data-path", text_wds_dir, "--train-iters", 1, "--dry-run"]
    for command in (["train", "--load", experts_model_dir, *given, "--tp", 2],
                    ["parity", experts_model_dir, "--tp", 2]):
        done = megatron_vl(*command)
        assert done.code == 2 and says in done.err, done.text
    for sizes, says in (
        ({"dp": 2, "ep": 4}, "4 ranks a stage, EP x ETP 1, but TP 1 x CP 1 x DP 2 are 2; start "
         "more processes, or lower the EP."),
        ({"tp": 2, "dp": 2, "ep": 4, "sequence_parallel": True}, "8 ranks a stage, EP x ETP 2, "
         "but TP 2 x CP 1 x DP 2 are 4; start more processes, or lower the EP, or the ETP."),
    ):
        with pytest.raises(InputError, match=re.escape(f"EP 4 needs a multiple of {says}")):
            spec = load_spec(experts_model_dir)
            spec.check_run(Layout(**sizes), spec.split())
    config = read_config_json(experts_model_dir) | {"moe_intermediate_size": 45}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = megatron_vl("convert", tmp_path, tmp_path / "out", "--tp", 2, "--dry-run")
    assert done.code == 2 and "TP 2 does not divide the model's 45 ffn width" in done.err


def test_two_families_are_told_apart(text_model_dir, model_dir, text_wds_dir, tmp_path):
    converted = tmp_path / "mcore"
    assert megatron_vl("convert", model_dir, converted).code == 0
    given = ["train", "--train-data-path", text_wds_dir, "--train-iters", 1, "--dry-run"]
    for command, says in (
        (["verify", text_model_dir, model_dir], "holds a qwen2 model but"),
        ([*given, "--load", converted, "--hf-config", text_model_dir],
         "holds a qwen2_vl model but config.json says qwen2"),
        (["convert", text_model_dir, tmp_path / "x", "--pp", 2, "--vit-pp-layers", "0,0"],
         "this model has no vision tower"),
        (["lint", text_wds_dir, "--model", text_model_dir, "--image-max-pixels", 10_000],
         "image-max-pixels is 10000, but qwen2 takes text alone"),
        (["parity", text_model_dir, "--vit-data-parallel"],
         "vit-data-parallel is true, but qwen2 takes text alone"),
    ):
        done = megatron_vl(*command)
        assert done.code == 2 and says in done.err and "Traceback" not in done.err, done.text
    assert not (tmp_path / "x").exists()


def test_a_run_that_goes_on_is_of_the_same_family_and_sizes(
    text_model_dir, model_dir, tmp_path
):
    deeper = read_config_json(text_model_dir) | {"num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(deeper))
    for other, says in ((model_dir, "(model_type qwen2 and qwen2_vl)"),
                        (tmp_path, "(decoder num_layers 4 and 5)")):
        with pytest.raises(InputError, match=re.escape(says)):
            check_same_model(text_model_dir, other)
