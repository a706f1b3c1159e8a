"""Experts in files: one by one, or stacked in either orientation, and back as they are published.

E experts, H hidden size, F width of an expert.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from commands import megatron_vl
from safetensors.torch import save_file
from tiny_hf import assert_equal, make, read, read_mcore

from megatron_vl.models import family, load_spec
from megatron_vl.models.registry import read_config_json

E, LAYERS = 4, 4
LANGUAGE = "model.language_model.layers"
GATE_UP, DOWN = f"{LANGUAGE}.0.mlp.experts.gate_up_proj", f"{LANGUAGE}.0.mlp.experts.down_proj"
SIZES = {"oblong": "96", "square gate_up_proj": "64", "square down_proj": "128"}  # of H = 64, 2F


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of each of SIZES, whose file holds its experts as it is published."""
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name.split()[-1], "--model-type", "qwen3_vl_moe", "--ffn-size", ffn,
                       "--vision-depth", "2", "--dtype", "float32")
            for name, ffn in SIZES.items()}


def stacks() -> list[str]:
    """Names of the tensors that hold a layer's experts."""
    return [f"{LANGUAGE}.{i}.mlp.experts.{one}" for i in range(LAYERS)
            for one in ("gate_up_proj", "down_proj")]


def turned(tensors):
    """Every expert's matrices transposed."""
    return tensors | {name: tensors[name].mT.contiguous() for name in stacks()}


def by_transformers(tensors):
    """As transformers 5 holds them: [E, 2F, H] and [E, H, F]."""
    is_published = tensors[GATE_UP].shape[1] == tensors[DOWN].shape[2] == 64
    return turned(tensors) if is_published else tensors


def one_by_one(tensors):
    """A tensor a matrix, as other tools write them."""
    tensors = by_transformers(tensors)
    found = {name: one for name, one in tensors.items() if ".experts." not in name}
    for name in stacks():
        layer, what = name.rsplit(".", 1)
        for e, matrix in enumerate(tensors[name]):
            names = ("gate_proj", "up_proj") if what == "gate_up_proj" else ("down_proj",)
            for one, rows in zip(names, matrix.chunk(len(names)), strict=True):
                found[f"{layer}.{e}.{one}.weight"] = rows.contiguous()
    return found


FORMS = {"as published": dict, "by transformers": by_transformers, "one by one": one_by_one}


def write(source, out, tensors):
    """The model of `source` with other tensors."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def convert(*words) -> None:
    done = megatron_vl("convert", *words)
    assert done.code == 0 and "warning" not in done.text, done.text


def test_a_file_holds_experts_as_published(models):
    tensors = read(models["oblong"])
    assert {tensors[name].shape for name in stacks()} == {(E, 64, 96), (E, 48, 64)}
    saved = family("qwen3_vl_moe").judge().from_pretrained(models["oblong"]).state_dict()
    assert_equal({name: saved[name] for name in tensors}, by_transformers(tensors))


@pytest.mark.parametrize("layout", [("--tp", 2, "--pp", 2, "--ep", 2), ("--pp", 2, "--vp", 2),
                                    ("--format", "torch_dist")])
@pytest.mark.parametrize("form", FORMS)
def test_experts_of_any_form_come_home_as_published(form, layout, models, tmp_path):
    source = models["oblong"]
    given = write(source, tmp_path / "given", FORMS[form](read(source)))
    convert(given, tmp_path / "ours", *layout)
    convert(tmp_path / "ours", tmp_path / "home", "--hf-config", given)
    assert_equal(read(tmp_path / "home"), read(source))
    assert megatron_vl("verify", given, tmp_path / "ours").code == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_has_its_part_of_every_expert(form, models, tmp_path):
    """Gate and up, each cut by rows, and down by columns."""
    source = models["oblong"]
    tensors = read(source)
    convert(write(source, tmp_path / "given", FORMS[form](tensors)), tmp_path / "ours", "--tp", 2)
    singles = one_by_one(tensors)
    for rank, content in enumerate(read_mcore(tmp_path / "ours").values()):
        for i in range(LAYERS):
            for e in range(E):
                gate, up, down = (singles[f"{LANGUAGE}.{i}.mlp.experts.{e}.{one}_proj.weight"]
                                  for one in ("gate", "up", "down"))
                ours = f"language_model.decoder.layers.{i}.mlp.experts.local_experts.{e}"
                first = torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
                assert torch.equal(content["model"][f"{ours}.linear_fc1.weight"], first)
                second = down.chunk(2, dim=1)[rank]
                assert torch.equal(content["model"][f"{ours}.linear_fc2.weight"], second)


def test_what_transformers_would_draw_at_random_is_not_asked(models, tmp_path):
    given = write(models["oblong"], tmp_path / "given", one_by_one(read(models["oblong"])))
    for command in (["chat", given, "Hello"], ["parity", given]):
        done = megatron_vl(*command)
        assert done.code == 2 and f"given has no {DOWN}, {GATE_UP}, " in done.err, done.text
        assert "and 4 more, which transformers looks for; write it as it was" in done.err


@pytest.mark.parametrize("name", ["square gate_up_proj", "square down_proj"])
def test_what_looks_alike_in_both_orientations_is_told_by_the_other(name, models, tmp_path):
    """transformers 5 reads it as it lies, so that it is written as that has it."""
    source = models[name]
    tensors = read(source)
    assert {tensors[one].shape[1] for one in stacks()} == {int(SIZES[name]), 64}
    for form in (dict, turned):
        given = write(source, tmp_path / form.__name__, form(tensors))
        convert(given, tmp_path / f"{form.__name__}-ours", "--tp", 2)
        home = tmp_path / f"{form.__name__}-home"
        convert(tmp_path / f"{form.__name__}-ours", home)
        assert_equal(read(home), tensors)
    singles = write(source, tmp_path / "singles", one_by_one(tensors))
    assert megatron_vl("verify", source, singles).code == 0
    saved = family("qwen3_vl_moe").judge().from_pretrained(home).state_dict()
    assert_equal({one: saved[one] for one in tensors}, tensors)


def test_what_transformers_saved_is_the_same_model(tmp_path):
    """Its text_config ties the head to the embedding by default, which it does not heed, and does
    not say that the weights of a token's experts sum to one, as they always do."""
    source = make(tmp_path / "source", "--model-type", "qwen3_vl_moe", "--untied")
    config = read_config_json(source)
    del config["text_config"]["tie_word_embeddings"], config["text_config"]["norm_topk_prob"]
    (source / "config.json").write_text(json.dumps(config))
    family("qwen3_vl_moe").judge().from_pretrained(source).save_pretrained(tmp_path / "saved")
    saved = read_config_json(tmp_path / "saved")
    assert (saved["tie_word_embeddings"], saved["text_config"]["tie_word_embeddings"]) == (
        False, True)
    spec = load_spec(source)
    assert spec == load_spec(tmp_path / "saved") and spec.decoder.experts.renormalized
    assert megatron_vl("verify", source, tmp_path / "saved").code == 0


def test_qwen3s_experts_are_read_stacked_and_written_one_by_one(experts_model_dir, tmp_path):
    source = experts_model_dir
    model = family("qwen3_moe").judge().from_pretrained(source)
    given = shutil.copytree(source, tmp_path / "given")
    model.save_pretrained(given, save_original_format=False)
    assert read(given)["model.layers.0.mlp.experts.gate_up_proj"].shape == (E, 96, 64)
    convert(given, tmp_path / "ours", "--tp", 2)
    convert(tmp_path / "ours", tmp_path / "home", "--hf-config", source)
    assert_equal(read(tmp_path / "home"), read(source))


def without(name):
    return lambda tensors: {key: one for key, one in tensors.items() if key != name}


def changed(name, change):
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


def with_one_expert_twice(tensors):
    name = f"{LANGUAGE}.1.mlp.experts.2.up_proj.weight"
    return tensors | {name: one_by_one(tensors)[name]}


def half_one_by_one(tensors):
    """Of a layer; what is left stacked looks alike in both orientations."""
    singles = one_by_one(tensors)
    down = {key: one for key, one in singles.items() if f"{LANGUAGE}.0.mlp.experts." in key
            and "down_proj" in key}
    return without(f"{LANGUAGE}.0.mlp.experts.down_proj")(tensors) | down


BROKEN = [  # of which model, what is done to its tensors, and what is said
    ("oblong", without(DOWN), f"1 published key(s) are missing: {DOWN};"),
    ("oblong", lambda tensors: without(f"{LANGUAGE}.3.mlp.experts.1.gate_proj.weight")(
        one_by_one(tensors)), f"are missing: {LANGUAGE}.3.mlp.experts.1.gate_proj.weight;"),
    ("oblong", changed(GATE_UP, lambda one: one[:3]),
     f"{GATE_UP} has shape [3, 64, 96] but config.json asks for [4, 64, 96], or [4, 96, 64]"),
    ("oblong", changed(DOWN, lambda one: one.mT), f"of {GATE_UP} [4, 64, 96] and {DOWN} [4, 64, "
     "48] the experts of one are transposed and those of the other are not"),
    ("oblong", with_one_expert_twice, f"{LANGUAGE}.1.mlp.experts.2.up_proj.weight is in "
     f"model.safetensors and again, within {LANGUAGE}.1.mlp.experts.gate_up_proj"),
    ("oblong", lambda tensors: changed(f"{LANGUAGE}.0.mlp.experts.0.up_proj.weight",
                                       torch.Tensor.half)(one_by_one(tensors)),
     f"{GATE_UP} would join tensors of dtypes float16, float32; pass --dtype"),
    ("square gate_up_proj", half_one_by_one,
     f"the shape of {GATE_UP} [4, 64, 64] does not tell whether its experts are transposed"),
]


@pytest.mark.parametrize(("model", "change", "says"), BROKEN, ids=[says for *_, says in BROKEN])
def test_experts_that_are_not_understood_are_refused(model, change, says, models, tmp_path):
    given = write(models[model], tmp_path / "given", change(read(models[model])))
    done = megatron_vl("convert", given, tmp_path / "out", "--to", "hf")
    assert done.code == 2 and says in done.err and "Traceback" not in done.err, done.text
    assert not (tmp_path / "out").exists()
