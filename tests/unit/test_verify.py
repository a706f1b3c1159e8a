"""`megatron-vl verify`: equal whatever the layout, and every way of not being equal is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf import make

from megatron_vl.cli.main import run

NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hf") / "tied", "--dtype", "float32")


@pytest.fixture(scope="module")
def mcore(hf, tmp_path_factory):
    out = tmp_path_factory.mktemp("mcore") / "tp2pp2"
    assert run(["convert", str(hf), str(out), "--tp", "2", "--pp", "2"]) == 0
    return out


def verify(a, b, *options) -> int:
    return run(["verify", str(a), str(b), *options])


def changed(hf, tmp_path, change):
    """A copy of `hf` after `change(tensors)`."""
    out = shutil.copytree(hf, tmp_path / "changed")
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def figures(text: str) -> list[str]:
    """The table's row: compared, bytes, differing, missing in A, missing in B, largest."""
    return text.strip().splitlines()[-1].split()[:6]


LAYOUTS = [
    ["--tp", "4", "--pp", "2", "--first-stage-layers", "1"],  # more ranks than key/value heads
    ["--pp", "2", "--vp", "2"],
    ["--pp", "4", "--pp-layers", "0,1,2,1", "--vit-pp-layers", "1,1,0,0"],
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_layouts_of_the_same_weights_are_equal(layout, hf, mcore, tmp_path, capsys):
    assert run(["convert", str(mcore), str(tmp_path / "other"), *layout, "--verify"]) == 0
    assert verify(hf, tmp_path / "other") == 0
    compared, nbytes, *zeros = figures(capsys.readouterr().out)
    tensors = load_file(hf / "model.safetensors")
    assert int(compared) == len(tensors) and zeros == ["0"] * 4
    assert int(nbytes.replace(",", "")) == sum(one.nbytes for one in tensors.values())


@pytest.mark.parametrize("value, largest", [(0.25, "0.25"), (float("nan"), "inf")])
def test_one_element_that_differs_is_found_and_named(value, largest, hf, mcore, tmp_path, capsys):
    def change(tensors):
        tensors[NAME][3, 5] = tensors[NAME][3, 5] + value

    assert verify(changed(hf, tmp_path, change), mcore) == 1
    said = capsys.readouterr()
    row = next(line for line in said.out.splitlines() if line.startswith(NAME))
    assert " 1 of " in row and figures(said.out)[2:5] == ["1", "0", "0"]
    assert float(figures(said.out)[5]) == pytest.approx(float(largest), rel=1e-3)
    assert "do not hold the same tensors" in said.err


def test_the_same_nan_is_equal_and_another_sign_of_zero_is_not(hf, tmp_path, capsys):
    def change(tensors):
        tensors[NAME][0, :2] = torch.tensor([float("nan"), 0.0])

    one = changed(hf, tmp_path, change)
    assert run(["convert", str(one), str(tmp_path / "mcore"), "--tp", "2"]) == 0
    assert verify(one, tmp_path / "mcore") == 0
    tensors = load_file(one / "model.safetensors")
    tensors[NAME][0, 1] = -0.0
    save_file(tensors, one / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert verify(one, tmp_path / "mcore") == 1
    assert figures(capsys.readouterr().out)[2:] == ["1", "0", "0", "0"]


def test_what_one_of_them_lacks_is_missing(hf, mcore, tmp_path, capsys):
    def change(tensors):
        del tensors[NAME]

    less = changed(hf, tmp_path, change)
    assert verify(mcore, less) == 1
    out = capsys.readouterr().out
    assert f"{NAME}  missing in {less}" in out and figures(out)[2:5] == ["0", "0", "1"]
    assert verify(less, mcore) == 1
    assert figures(capsys.readouterr().out)[2:5] == ["0", "1", "0"]


def test_a_rank_that_lacks_its_shard_makes_the_tensor_missing(hf, mcore, tmp_path, capsys):
    torn = shutil.copytree(mcore, tmp_path / "torn")
    file = torn / "release" / "mp_rank_01_000" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    del content["model"]["vision_model.decoder.layers.0.mlp.linear_fc1.weight"]
    torch.save(content, file)
    assert verify(hf, torn) == 1
    assert f"visual.blocks.0.mlp.fc1.weight  missing in {torn}" in capsys.readouterr().out


def test_copies_inside_a_checkpoint_that_differ_are_named(hf, mcore, tmp_path, capsys):
    torn = shutil.copytree(mcore, tmp_path / "torn")
    file = torn / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["model"]["language_model.output_layer.weight"][0, 0] += 1
    torch.save(content, file)
    assert verify(hf, torn) == 1
    assert "is stored twice and the copies differ" in capsys.readouterr().out


def test_dtypes_differ_unless_they_may(hf, tmp_path, capsys):
    low = tmp_path / "low"
    options = ["--tp", "2", "--dtype", "bfloat16", "--verify"]
    assert run(["convert", str(hf), str(low), *options]) == 0
    assert verify(hf, low, "--dtype-tolerant") == 0
    assert verify(low, hf, "--dtype-tolerant") == 0
    capsys.readouterr()
    assert verify(hf, low) == 1
    out = capsys.readouterr().out
    assert "(float32 and bfloat16)" in out and "and " in out.splitlines()[20]

    def change(tensors):
        tensors[NAME][3, 5] *= 1.5

    assert verify(changed(hf, tmp_path, change), low, "--dtype-tolerant") == 1


def test_what_cannot_be_compared_is_refused(hf, mcore, tmp_path, capsys):
    other = make(tmp_path / "other", "--num-layers", "2", "--dtype", "float32")
    for options, names in (
        ([hf, other], "key(s) are unmapped: model.layers"),
        ([hf, tmp_path / "none"], "none does not exist"),
        ([hf, mcore, "--workers", "0"], "--workers is 0"),
    ):
        first, second, *more = options
        # The smaller model comes first: the larger one's layers have no place in it.
        assert verify(*(second, first) if second == other else (first, second), *more) == 2
        assert names in capsys.readouterr().err
    config = json.loads((mcore / "config.json").read_text())
    config["num_key_value_heads"] = 1
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    assert verify(hf, mcore, "--hf-config", str(tmp_path / "wrong")) == 2
    assert "config.json" in capsys.readouterr().err
