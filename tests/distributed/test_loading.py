"""What a run finds in the weights that it is given, and that they are those of a conversion."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import loading_ranks
import pytest
import tiny_hf
import torch
from commands import megatron_vl, run
from safetensors.torch import load_file, save_file

from megatron_vl.weights import inspect_checkpoint

# name -> model, layout, how the checkpoint for just this layout is converted, what is loaded
SIZES = {"tp": "--tp", "pp": "--pp", "vp": "--vp", "ep": "--ep", "etp": "--etp"}
SPAN = ["--vit-pp-layers", "1,1", "--pp-layers", "0,4"]
GRID = {
    "tp2 of hf": ("tied", dict(tp=2), [], "hf"),
    "tp2 of torch_dist": ("tied", dict(tp=2), [], "torch_dist"),
    "tp2 padded": ("padded", dict(tp=2), [], "hf"),
    "tp2 of two stages": ("padded", dict(tp=2), [], "other"),
    "pp2 tied": ("tied", dict(pp=2), [], "hf"),
    "pp2 untied": ("untied", dict(pp=2), ["--first-stage-layers", "1"], "other"),
    "pp2 vision over both": ("tied", dict(pp=2), SPAN, "torch_dist"),
    "pp2 vp2": ("untied", dict(pp=2, vp=2), [], "hf"),
    "dp2 of tp2": ("tied", dict(dp=2), [], "tp2"),
    "cp2": ("untied", dict(cp=2), [], "hf"),
    "tp2 with whole towers": ("tied", dict(tp=2, vit_data_parallel=True), [], "tp2"),
    "tp2 in bfloat16": ("tied", dict(tp=2), ["--dtype", "bfloat16"], "hf"),
    "tp2 pp2 vp2 of torch_dist": ("tied", dict(tp=2, pp=2, vp=2), [], "torch_dist"),
    "tp4 of two stages": ("untied", dict(tp=4), [], "other"),
    "tp2 pp2 with whole towers": ("tied", dict(tp=2, pp=2, vit_data_parallel=True), [], "hf"),
    "tp2 pp2 with whole towers over both": (
        "tied", dict(tp=2, pp=2, vit_data_parallel=True), SPAN, "hf"),
    "tp2 of vision over two stages": ("tied", dict(tp=2), [], "spread"),
    "pp2 of virtual stages": ("untied", dict(pp=2), ["--first-stage-layers", "1"], "virtual"),
    "tp2 pp2 of tp4": ("tied", dict(tp=2, pp=2), [], "tp4"),
    "ep2 of hf": ("experts", dict(dp=2, ep=2), [], "hf"),
    "tp2 ep2 whole experts of torch_dist": (
        "experts", dict(tp=2, ep=2, etp=1, sequence_parallel=True), [], "torch_dist"),
    "pp2 cp2 ep2 of ep4": ("experts", dict(pp=2, cp=2, ep=2), [], "ep4"),
}


def ranks_of(layout: dict) -> int:
    found = 1
    for size in ("tp", "pp", "cp", "dp"):
        found *= layout.get(size, 1)
    return found


@pytest.fixture(scope="module")
def found(shared, experts_model_dir) -> Path:
    """What every rank of every row of `GRID` found."""

    def convert(source: Path, out: Path, *options: object) -> Path:
        if not out.exists():
            done = megatron_vl("convert", source, out, *options)
            assert done.code == 0, done.text
        return out

    def load(out: Path) -> None:
        out.mkdir()
        models = {
            "tied": tiny_hf.make(out / "tied"), "untied": tiny_hf.make(out / "untied", "--untied"),
            "padded": tiny_hf.make(out / "padded", vocab_size=1501),
            "experts": experts_model_dir,
        }
        jobs = {}
        for name, (model, layout, options, source) in GRID.items():
            hf = models[model]
            sizes = [word for size, flag in SIZES.items() if size in layout
                     for word in (flag, layout[size])]
            made = convert(hf, out / f"{name}-made", *sizes, *options)
            sources = {
                "hf": [], "torch_dist": ["--format", "torch_dist"], "tp2": ["--tp", "2"],
                "tp4": ["--tp", "4"], "other": ["--pp", "2", "--first-stage-layers", "3"],
                "spread": ["--pp", "2", *SPAN], "virtual": ["--pp", "2", "--vp", "2"],
                "ep4": ["--ep", "4"],
            }[source]
            given = convert(hf, out / f"{model}-{source}", *sources) if sources else hf
            jobs[name] = {
                "hf": str(hf), "layout": layout, "source": str(given), "made": str(made),
                "split": inspect_checkpoint(made).split.to_dict(), "ranks": ranks_of(layout),
                "dtype": "bfloat16" if "bfloat16" in options else "float32",
            }
            if "vit_data_parallel" in layout:
                whole = convert(hf, out / f"{name}-whole", *sizes, *options, "--tp", "1")
                jobs[name]["whole"] = str(whole)
        (out / "jobs.json").write_text(json.dumps(jobs))
        for ranks in sorted({job["ranks"] for job in jobs.values()}):
            done = run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc-per-node", ranks, loading_ranks.__file__, out])
            assert done.code == 0, done.text

    return shared.made("loaded", load)


def ranks_found(found: Path, name: str) -> list[dict]:
    _, layout, _, _ = GRID[name]
    return [json.loads((found / f"{name}.{rank}.json").read_text())
            for rank in range(ranks_of(layout))]


@pytest.mark.parametrize("name", GRID)
def test_weights_of_any_kind_are_to_the_bit_those_of_a_conversion(name, found):
    for one in ranks_found(found, name):
        assert one["seen"] and not one["differ"], one
        assert not one["not finite"]


def test_every_rank_makes_equally_many_process_groups_for_its_model(found):
    """Whether it has a vision tower or not: torch's name of the next group is their number."""
    made = {name: [one["groups"] for one in ranks_found(found, name)] for name in GRID}
    assert made["tp2 pp2 with whole towers"] == [1, 1, 1, 1]
    assert all(len(set(groups)) == 1 for groups in made.values()), made


def test_numbers_that_are_none_are_counted_once_however_many_ranks_read_them(workshop, tmp_path):
    source = shutil.copytree(workshop.model_dir, tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3:5] = torch.tensor([float("nan"), float("inf")])
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    done = workshop.train("not-finite", TP=2, PRETRAIN_CHECKPOINT_PATH=source, TRAIN_ITERS=2,
                          LR_WARMUP_ITERS=0, OUTPUT_BASEPATH=tmp_path / "out")
    assert "WARNING: 2 numbers of model.norm.weight are NaN or infinite" in done.out, done.text
    assert done.out.count("are NaN or infinite") == 1
    # Every step is skipped then, and saved all the same.
    assert done.code == 0 and "iter_0000002" in done.out, done.text


def test_copies_of_a_tied_weight_that_differ_are_refused(workshop, tmp_path):
    source = shutil.copytree(workshop.weights(1, 2), tmp_path / "weights")
    file = source / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["model"]["language_model.output_layer.weight"][7] += 1
    torch.save(content, file)
    done = workshop.train("twins", PP=2, PRETRAIN_CHECKPOINT_PATH=source,
                          OUTPUT_BASEPATH=tmp_path / "out")
    assert done.code == 2, done.text
    assert "is stored twice and the copies differ" in done.err and str(source) in done.err
