"""Whatever a family's folder is to give, for every family there is."""

from __future__ import annotations

import json

import pytest
import torch
from commands import megatron_vl

from megatron_vl.models import family, known_families, load_spec
from megatron_vl.models.registry import read_config_json

TINY = {"qwen2": "text_model_dir", "qwen2_vl": "model_dir"}
PUBLISHED = {  # what config.json of a published size has, and its parameters
    "qwen2": ({  # Qwen2.5-7B
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "tie_word_embeddings": False,
    }, 7_615_616_512),
}


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_is_counted_right(name, request, tmp_path):
    sizes, parameters = PUBLISHED[name]
    config = read_config_json(request.getfixturevalue(TINY[name]))
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    spec = load_spec(tmp_path)
    assert sum(family(name).weight_map(spec).counts().values()) == parameters
    done = megatron_vl("convert", tmp_path, tmp_path / "out", "--tp", 4, "--pp", 2, "--dry-run")
    assert done.code == 0, done.text


VISION_OPTIONS = [
    ("--freeze-vit", "freeze-vit is True, but qwen2 takes text alone; leave it out."),
    ("--vit-lr", "vit-lr is 0.1, but qwen2 takes text alone; leave it out."),
    ("--image-max-pixels", "image-max-pixels is 1, but qwen2 takes text alone; leave it out."),
    ("--vit-pp-layers", "vit-pp-layers is 1,1, but qwen2 takes text alone; leave it out."),
    ("--freeze-llm", "freeze-llm leaves nothing to train of qwen2, which is a language model "
                     "alone; leave it out."),
]


@pytest.mark.parametrize(("option", "says"), VISION_OPTIONS)
def test_a_text_model_refuses_what_is_about_vision(option, says, text_model_dir):
    values = {"--vit-lr": ["0.1"], "--image-max-pixels": ["1"], "--vit-pp-layers": ["1,1"]}
    done = megatron_vl("train", "--load", text_model_dir, "--train-data-path", "none", option,
                       *values.get(option, []), "--train-iters", 1, "--dry-run")
    assert (done.code, done.err) == (2, f"megatron-vl train: {says}\n"), done.text
