"""Logits, loss and every gradient against transformers, in every layout, on real gloo ranks."""

from __future__ import annotations

import pytest
import tiny_hf
from commands import megatron_vl

# fp32: sums run in another order over tensor-parallel ranks and packed rows, and nothing else.
TOLERANCE = "1e-5"

LAYOUTS = {
    "TP1 PP1": [],
    "TP2": ["--tp", 2],
    "TP2 with sequence parallelism": ["--tp", 2, "--sequence-parallel"],
    "TP4, more ranks than key/value heads": ["--tp", 4],
    "PP2, uneven first stage": ["--pp", 2, "--first-stage-layers", 1],
    "TP2 PP2 with sequence parallelism": ["--tp", 2, "--pp", 2, "--sequence-parallel"],
    "PP2 VP2": ["--pp", 2, "--vp", 2],
    # The last batch has all its images on rank 0; overlapped, every weight must report a gradient.
    "DP2, one rank without images, overlapped": ["--dp", 2, "--overlap-grad-reduce"],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_logits_loss_and_gradients_equal_transformers(layout, model_dir):
    done = megatron_vl("parity", model_dir, "--tolerance", TOLERANCE, *layout)
    assert done.code == 0, done.text
    assert done.text.count("(of 81)") == 4, done.text  # four batches, every parameter


def test_an_untied_model_equals_transformers_over_tp2_pp2(untied_dir):
    done = megatron_vl("parity", untied_dir, "--tolerance", TOLERANCE, "--tp", 2, "--pp", 2)
    assert done.code == 0, done.text
    assert done.text.count("(of 82)") == 4, done.text


def test_rows_that_pad_the_vocabulary_change_nothing(tmp_path):
    odd = tiny_hf.make(tmp_path / "odd", "--init-std", "0.02", vocab_size=277)
    done = megatron_vl("parity", odd, "--tolerance", TOLERANCE, "--tp", 2)
    assert done.code == 0, done.text


def test_a_tolerance_that_cannot_be_met_fails_and_names_the_case(model_dir):
    done = megatron_vl("parity", model_dir, "--tolerance", "1e-12")
    assert done.code == 1
    assert "images of several sizes" in done.err and "further than 1e-12" in done.err
