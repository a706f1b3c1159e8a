"""What a run finds in the weights that it is given."""

from __future__ import annotations

import shutil

import torch
from safetensors.torch import load_file, save_file


def test_numbers_that_are_none_are_counted_once_however_many_ranks_read_them(workshop, tmp_path):
    source = shutil.copytree(workshop.model_dir, tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3:5] = torch.tensor([float("nan"), float("inf")])
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    done = workshop.train("not-finite", TP=2, PRETRAIN_CHECKPOINT_PATH=source,
                          OUTPUT_BASEPATH=tmp_path / "out")
    assert "WARNING: 2 numbers of model.norm.weight are NaN or infinite" in done.out, done.text
    assert done.out.count("are NaN or infinite") == 1
    # Every step is skipped then, and saved all the same.
    assert done.code == 0 and "iter_0000010" in done.out, done.text


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
