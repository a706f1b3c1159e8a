"""Prediction and fact of a run's first steps, the advice, and `--layout auto`."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest
from metric_log import STEP
from true_sizes import write

from megatron_vl.cli.main import run
from megatron_vl.parallel import LANGUAGE, Layout
from megatron_vl.planner.cards import CARDS, DEVICES, card_of
from megatron_vl.planner.in_run import compare, predicted_memory
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.options.spellings import key_of
from megatron_vl.training.plan import plan_run
from megatron_vl.training.reporting.first_steps import Compared, FirstSteps, Measured, told
from megatron_vl.training.resilience.stragglers import Straggler

GIB = 2**30


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """config.json of 28 language layers."""
    return write(tmp_path_factory.mktemp("published") / "7B", "7B", "qwen2_vl")


def planned(hf, world, **options):
    return plan_run(TrainConfig.from_dict({
        "hf_config": str(hf), "train_data_path": "DATA", "bf16": True, **options,
    }), world, here=False)


def measured(busy, *, memory=None, step=10.0, wait=0.0, **more) -> Measured:
    """A step whose stages compute `busy` seconds, a third of it forward."""
    return Measured(**{
        "iteration": 10, "device": "x86", "step_seconds": step, "data_wait_seconds": wait,
        "forward": tuple(one / 3 for one in busy),
        "backward": tuple(2 * one / 3 for one in busy),
        "memory_bytes": memory and tuple(int(one * GIB) for one in memory),
        "samples": 8, "tokens": 16384, "trained_tokens": 0, "vision_flops": 1e14,
        "llm_flops": 1e15, "slowest": None, **more,
    })


PP2 = {"pipeline_model_parallel_size": 2, "global_batch_size": 16}
PP4 = {"pipeline_model_parallel_size": 4, "global_batch_size": 32}
FULL = {"recompute_granularity": "full", "lora_rank": 8, "seq_length": 4096, "global_batch_size": 8}
SLOW = Straggler(ranks=(1,), hosts=("a",), ratio=2.0)


@pytest.mark.parametrize(("options", "busy", "more", "advice"), [
    # Stage 1 takes 0.5 s a layer, stage 0 2 s more for its tower: 12 and 16 layers are 8 s each.
    (PP2, (9.0, 7.0), {}, r"Stage 0 computes 1\.3 times as long as the others: "
                          r"--first-stage-layers 12 would make steps \d+% shorter\."),
    (PP2 | {"pp_layers": "14,14"}, (9.0, 7.0), {}, r"others: --pp-layers 12,16 would"),
    (PP2 | {"decoder_first_pipeline_num_layers": 14}, (9.0, 7.0), {}, r"--first-stage-layers 12 w"),
    (PP4, (7.0, 3.5, 3.5, 3.5), {}, r"Stage 0 computes 2\.0 times .*: --first-stage-layers 1 wo"),
    (PP4, (3.5, 3.5, 3.5, 7.0), {}, r"Stage 3 .*: --pp-layers \d+,\d+,\d+,[12] would"),
    (PP4 | {"global_batch_size": 4}, (6.0,) * 4, {"step": 14.0},
     r"Stages wait for one another \d+% of a step: --num-virtual-stages-per-pipeline-rank 2"),
    (PP4 | {"global_batch_size": 6}, (6.0,) * 4, {"step": 14.0},
     r"Stages wait .*: --global-batch-size 12 would take \d+% less time a row"),
    ({"num_workers": 1}, (5.0,), {"wait": 3.0},
     r"Reading data takes 30% of a step: --num-workers 2 in a new run would make steps 30% s"),
    (FULL, (9.0,), {"memory": (30,), "device": "NVIDIA H100 80GB HBM3"},
     r"38\.5 of 68\.5 GiB are free .*: (--micro-batch-size 2|no --recompute-granularity full) "),
    # Nothing helps, it does not fit, or a slow rank is told of already.
    (PP2, (8.0, 8.0), {"step": 8.6}, None),
    (FULL, (9.0,), {"memory": (68,), "device": "NVIDIA H100 80GB HBM3"}, None),
    (PP2, (9.0, 7.0), {"slowest": SLOW}, None),
])
def test_what_is_advised_is_computed_and_accepted(hf, monkeypatch, options, busy, more, advice):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    plan, seen = planned(hf, len(busy), **options), measured(busy, **more)
    found = compare(plan, seen, per_node=len(busy))
    if advice is None:
        assert not found.advice
        return
    assert re.search(advice, found.advice), found.advice
    # The run takes what is named.
    named = found.advice.partition(": ")[2].partition(" would")[0].removesuffix(" in a new run")
    words = shlex.split(named)
    if words[0] == "no":
        named = {key_of(words[1]): None}
    else:
        named = {key_of(flag): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    tried = planned(hf, len(busy), **options | named)
    if {"pp_layers", "decoder_first_pipeline_num_layers"} & set(named) and tried.split.vp == 1:
        layers = [len(tried.split.layers(LANGUAGE, stage, 0)) for stage in range(len(busy))]
        slowest = max(range(len(busy)), key=lambda stage: busy[stage])
        assert layers[slowest] < 28 // len(busy) and sum(layers) == 28


def test_the_first_steps_are_told_once_without_the_very_first():
    of = FirstSteps(layout=Layout(tp=1, pp=2, dp=2), device="x", counts_memory=True)
    found = [
        of.add(replace(STEP, iteration=i, step_seconds=1000.0 if i == 1 else 2.0),
               forward=[9.0] * 4 if i == 1 else [0.1, 0.3, 0.5, 0.5], backward=[0.2, 0.4, 1.0, 1.0],
               memory=[GIB, 3 * GIB, GIB, 2 * GIB])
        for i in range(1, 13)
    ]
    (seen,) = [one for one in found if one is not None]
    assert found[9] is seen and seen.step_seconds == 2.0
    assert seen.forward == (0.2, 0.5) and seen.busy == pytest.approx((0.5, 1.5))
    assert seen.memory_bytes == (3 * GIB, 2 * GIB)
    compared = Compared(memory_bytes=(2 * GIB, GIB), card="C", step_seconds=1.5, advice="Do.")
    assert told(seen, compared) == (
        "the first steps, to iteration 10: memory 3.00 GiB on stage 0, 2.00 GiB predicted; a step "
        "2 s, 1.5 s predicted for C; stages compute 25%, 75% of it; waits for data 2%. Do.")
    assert "a CPU does not count" in told(replace(seen, memory_bytes=None), compared)
    short = FirstSteps(layout=Layout(tp=1, pp=1, dp=1), device="x", counts_memory=False)
    ends = [short.add(STEP, forward=[1.0], backward=[2.0], memory=[0], last=i == 3)
            for i in range(4)]
    assert [one is None for one in ends] == [True, True, True, False]


def test_a_card_is_known_by_its_driver_s_name():
    assert DEVICES.keys() == CARDS.keys()
    known = {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-40GB": "a100-40g", "Ascend910B1": "910b"}
    assert {name: card_of(name) for name in known} == {
        name: CARDS[card] for name, card in known.items()}
    assert card_of("NVIDIA H200 NVL") is card_of("NVIDIA A100 80GB PCIe") is None


@pytest.fixture
def card(hf_dir, tmp_path):
    """A card with too little memory for one rank, and enough for each of two."""
    room = [max(one.bytes for one in predicted_memory(planned(
        hf_dir, world, tensor_model_parallel_size=world, recompute_granularity="full",
        sequence_parallel=True))) for world in (1, 2)]
    file = tmp_path / "card.json"
    file.write_text(json.dumps({
        "name": "a small card", "memory_gb": sum(room) / 2e9, "usable_memory": 1,
        "peak_tflops": 0.05, "memory_tb_s": 0.01, "node_gb_s": 1, "network_gb_s": 1}))
    return file


@pytest.mark.parametrize(("words", "code", "says"), [
    (["--nproc-per-node", 2], 0, [
        r"^layout auto: \S+, by prediction the fastest of \d+ ways to run that fit 2 x a small "
        r"card: .* GiB on the fullest rank; --", r"^dry run of qwen2_vl, (?!TP1xPP1xCP1xDP2)"]),
    (["--nproc-per-node", 2, "--recompute-granularity", "full", "--micro-batch-size", 1], 0,
     [r"rank; (?!.*(recompute|micro-batch))"]),
    (["--nproc-per-node", 1], 2, [r"no layout fits 1 x a small card, .* ranks would fit"]),
    (["--nproc-per-node", 2, "--tp", 1], 2, [r"--layout auto chooses .* --tp says a part of it"]),
    ([], 2, [r"this machine has no GPU; give --nproc-per-node"]),
    (["--nproc-per-node", 2, "--gpu", "h300"], 2, [r"--gpu h300 is no card"]),
])
def test_layout_auto_is_the_plan_s_first_for_the_run(hf_dir, card, capsys, words, code, says):
    command = ["train", "--layout", "auto", "--hf-config", hf_dir, "--train-data-path", "DATA",
               "--bf16", "--global-batch-size", 4, "--dry-run", "--gpu", card, *words]
    assert run(list(map(str, command))) == code
    text = "".join(capsys.readouterr())
    for one in says:
        assert re.search(one, text, re.M), text
    assert code == 0 or len(text.splitlines()) == 1


def test_layout_auto_needs_a_card_that_is_known(hf_dir, capsys):
    assert run(["train", "--layout", "auto", "--hf-config", str(hf_dir), "--train-data-path", "D",
                "--nproc-per-node", "2"]) == 2
    assert "is none that is known; give --gpu h200" in capsys.readouterr().err
