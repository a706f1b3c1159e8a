"""Conversions of a model whose experts are divided over ranks."""

import argparse
import re
import shutil

import pytest
import torch
from tiny_hf import assert_equal, read, read_mcore

from megatron_vl.cli.main import run
from megatron_vl.parallel import Layout
from megatron_vl.weights import inspect_checkpoint, load_rank

EXPERTS = 4


def convert(source, target, *options) -> int:
    return run(["convert", str(source), str(target), *map(str, options)])


def flags(sizes: dict) -> list:
    return [word for name, size in sizes.items() for word in (f"--{name}", size)]


def expert_of(published: dict, layer: int, expert: int, part: int, parts: int) -> dict:
    """An expert's tensors on one of the ranks that share it, by hand."""
    at = f"model.layers.{layer}.mlp.experts.{expert}"
    gate, up = (published[f"{at}.{name}_proj.weight"].chunk(parts)[part] for name in ("gate", "up"))
    down = published[f"{at}.down_proj.weight"].chunk(parts, dim=1)[part]
    return {"linear_fc1.weight": torch.cat([gate, up]), "linear_fc2.weight": down}


LAYOUTS = [
    ({"ep": 2}, {"pp": 2, "vp": 2, "ep": 4}),
    ({"tp": 2, "ep": 2}, {"tp": 2, "ep": 4, "etp": 1}),
    ({"tp": 4, "ep": 2, "etp": 2}, {"ep": 2, "pp": 2}),
    ({"tp": 2, "pp": 2, "ep": 2, "etp": 1}, {"tp": 2, "pp": 2}),
]


@pytest.mark.parametrize("one, two", LAYOUTS)
def test_experts_go_to_their_ranks_from_any_layout_to_any_other(
    one, two, experts_model_dir, tmp_path
):
    published = read(experts_model_dir)
    for sizes, source, made in ((one, experts_model_dir, "one"), (two, tmp_path / "one", "two")):
        assert convert(source, tmp_path / made, *flags(sizes)) == 0
        layout, info = Layout(**sizes), inspect_checkpoint(tmp_path / made)
        assert info.layout == layout
        assert len(read_mcore(tmp_path / made)) == layout.pp * len(layout.shards)
        held = EXPERTS // layout.ep
        for shard in layout.shards:
            chunks = load_rank(info, shard.tp, 0, shard.ep)
            state = chunks["model0" if layout.vp > 1 else "model"]
            at = "language_model.decoder.layers.0.mlp.experts.local_experts."
            wanted = {
                f"{at}{local}.{name}": tensor for local in range(held)
                for name, tensor in expert_of(published, 0, shard.ep * held + local,
                                              shard.tp % layout.expert_tp, layout.expert_tp).items()
            }
            assert_equal({name: state[name] for name in state if name.startswith(at)}, wanted)
    assert convert(tmp_path / "two", tmp_path / "back") == 0
    assert_equal(read(tmp_path / "back"), published)


@pytest.mark.parametrize("sizes, named", [
    ({"ep": 2}, ["mp_rank_00_000", "mp_rank_00_001"]),  # that might be two stages
    ({"tp": 2, "ep": 2, "etp": 1}, ["mp_rank_00_000_000", "mp_rank_01_000_001"]),
])
def test_what_other_tools_call_ranks_and_experts_is_read(
    sizes, named, experts_model_dir, tmp_path
):
    convert(experts_model_dir, tmp_path / "m", *flags(sizes))
    release = tmp_path / "m" / "release"
    for folder, name in zip(sorted(release.iterdir()), named, strict=True):
        file = folder / "model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        content["args"] = argparse.Namespace(**{
            key: value for key, value in vars(content["args"]).items() if key != "megatron_vl"})
        content["model"] = {  # as TransformerEngine's grouped layers call them
            re.sub(r"local_experts\.(\d+)\.(.*)\.weight", r"\2.weight\1", key): value
            for key, value in content["model"].items()}
        assert any(key.endswith("experts.linear_fc2.weight1") for key in content["model"])
        torch.save(content, file)
        folder.rename(release / name)
    assert convert(tmp_path / "m", tmp_path / "back") == 0
    assert_equal(read(tmp_path / "back"), read(experts_model_dir))


def test_a_missing_ranks_file_is_named(experts_model_dir, tmp_path, capsys):
    convert(experts_model_dir, tmp_path / "m", "--pp", 2, "--ep", 2)
    shutil.rmtree(tmp_path / "m" / "release" / "mp_rank_00_001_001")
    assert convert(tmp_path / "m", tmp_path / "back") == 2
    assert "lacks mp_rank_00_001_001/model_optim_rng.pt" in capsys.readouterr().err


@pytest.mark.parametrize("gone, ours, says", [
    ("mp_rank_01_003", True, "written for TP2xPP1xEP4xETP1xDP1 but its ranks' directories are "
     "those of TP2xPP1xEP3xETP1xDP1; copy it again"),
    (None, False, "release says an unusable layout of itself (etp 3 with tp 2 and ep 4"),
])
def test_a_layout_that_the_files_do_not_have_is_told(
    gone, ours, says, experts_model_dir, tmp_path, capsys
):
    convert(experts_model_dir, tmp_path / "m", "--tp", 2, "--ep", 4, "--etp", 1)
    release = tmp_path / "m" / "release"
    if gone:
        shutil.rmtree(release / gone)
    for file in () if ours else release.rglob("*.pt"):
        content = torch.load(file, weights_only=False)
        del content["args"].megatron_vl
        content["args"].expert_tensor_parallel_size = 3
        torch.save(content, file)
    assert convert(tmp_path / "m", tmp_path / "back") == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("model, options, says", [
    ("experts_model_dir", ["--ep", 3], "EP 3 does not divide the model's 4 experts of a layer"),
    ("experts_model_dir", ["--tp", 4, "--ep", 2, "--etp", 3], "etp 3 with tp 4 and ep 2"),
    ("experts_model_dir", ["--etp", 2], "etp 2 with tp 1 and ep 1 is not supported"),
    ("text_model_dir", ["--ep", 2], "EP 2 is for models with experts, and qwen2 has none"),
    ("experts_model_dir", ["--format", "torch_dist", "--ep", 2], "--ep is for --format torch"),
])
def test_what_cannot_be_divided_is_refused_by_name(
    model, options, says, request, tmp_path, capsys
):
    assert convert(request.getfixturevalue(model), tmp_path / "m", *options) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
