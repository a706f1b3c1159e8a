"""The trainer on real ranks: layouts agree, runs resume, checkpoints go home."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import megatron_vl, shell
from distributed_launch import LAUNCHER, words
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, load


def losses(steps: dict[int, dict]) -> list[float]:
    return [steps[i]["loss"] for i in sorted(steps)]


# Measured over ten steps at TP2, TP2 PP2 and PP2: 3e-8.
FP32 = 1e-6

LAYOUTS = {
    "TP2": pytest.param(dict(TP=2, PP=1), marks=pytest.mark.cold),
    "TP2 PP2, sequence parallel, 24 arguments": dict(TP=2, PP=2, SP="true"),
    "PP2 uneven, full recompute": dict(PP=2, first=1, AC="full"),
    "CP2 PP2": dict(PP=2, CP=2),
    "TP2 PP2, images divided": dict(TP=2, PP=2, extra="--vit-data-parallel"),
}


def follows(steps: dict[int, dict], plain: dict[int, dict]) -> None:
    """The steps are those of one rank, in fp32: losses, gradient norms, rates and rows."""
    assert sorted(steps) == sorted(plain)
    assert losses(steps) == pytest.approx(losses(plain), rel=FP32)
    for i in steps:
        assert steps[i]["grad_norm"] == pytest.approx(plain[i]["grad_norm"], rel=1e-5)
        assert steps[i]["lr"] == plain[i]["lr"]
        assert steps[i]["tokens"] == plain[i]["tokens"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_ten_steps_follow_those_of_one_rank(layout, workshop, plain_run):
    name = "-".join(f"{k}{v}" for k, v in layout.items())
    done = workshop.train(name, **layout)
    assert done.code == 0, done.text
    follows(workshop.steps(name), plain_run)


def every_layout(workshop) -> Path:
    """The model as a torch_dist checkpoint."""
    weights = workshop.root / "any layout"
    done = megatron_vl("convert", workshop.model_dir, weights, "--format", "torch_dist")
    assert done.code == 0, done.text
    return weights


def on_a_hub(workshop) -> str:
    """The model's name in ModelScope's cache."""
    shutil.copytree(workshop.model_dir, workshop.root / "hub" / "models" / "Qwen" / "Tiny-VL")
    return "Qwen/Tiny-VL"


SOURCES = {  # what a run that was not converted for is given, its layout, what it says of it
    "torch_dist": (every_layout, dict(TP=2, PP=2, first=1), "llm 1-3, vision 2-0"),
    "a name on a hub": (on_a_hub, dict(TP=2, PP=2, extra="--vit-data-parallel"),
                        "/hub/models/Qwen/Tiny-VL: 0 steps done"),
    "another split": (
        lambda workshop: workshop.weights(1, 2), dict(PP=2, first=1), "llm 1-3, vision 2-0"),
    "another TP and PP": (
        lambda workshop: workshop.weights(1, 2, 1), dict(TP=2), "llm 4, vision 2"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_ten_steps_from_weights_of_any_layout_follow_those_of_one_rank(
    name, workshop, plain_run, monkeypatch
):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(workshop.root / "hub"))
    weights, layout, said = SOURCES[name]
    done = workshop.train(name, **layout, PRETRAIN_CHECKPOINT_PATH=weights(workshop))
    assert done.code == 0 and said in done.out and "GiB a rank in" in done.out, done.text
    follows(workshop.steps(name), plain_run)


@pytest.mark.quick
def test_training_learns_and_logs_every_number(plain_run):
    assert sorted(plain_run) == list(range(1, 11))
    assert plain_run[10]["loss"] < 0.95 * plain_run[1]["loss"]
    for step in plain_run.values():
        assert step["tokens_per_second"] > 0 and step["grad_norm"] > 0 and not step["skipped"]
        assert 0 < step["trained_tokens"] < step["tokens"] <= 4 * 256
        assert step["samples"] == step["images"] > 4  # several samples a row
    # Warmup from 0 over two steps, then the cosine.
    assert [plain_run[i]["lr"] for i in (1, 2, 3)] == pytest.approx([0, 5e-4, 1e-3])


def test_what_a_run_leaves_unsaid_is_said(workshop, plain_run, hf_dir, tmp_path):
    other = tmp_path / "other"
    assert megatron_vl("convert", hf_dir, other, "--format", "torch_dist").code == 0
    save = workshop.checkpoint("plain")
    given = ["train", "--train-data-path", workshop.wds_dir, "--seq-length", 256]
    done = megatron_vl(*given, "--save", save, "--load", other, "--dry-run")
    assert done.code == 2, done.text
    assert f"--save {save} holds checkpoints of another model than --load {other}" in done.err
    assert "decoder num_layers 4 and 2" in done.err, done.err
    done = megatron_vl(*given, "--save", save, "--load", workshop.weights(1, 1), "--dry-run")
    assert "was trained with lr 0.001" in done.err, done.text  # the next thing that is looked at
    assert json.loads((save / "began_with.json").read_text())["load"] == str(workshop.weights(1, 1))
    copied = tmp_path / "copied"
    shutil.copytree(workshop.weights(1, 1), copied)
    done = megatron_vl(*given, "--save", save, "--load", copied, "--dry-run")
    assert "was trained with lr 0.001" in done.err, done.text  # the same weights elsewhere
    part = next(copied.rglob("*.pt"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    done = megatron_vl(*given, "--save", save, "--load", copied, "--dry-run")
    assert done.code == 2 and "which has other weights than --load" in done.err, done.text
    for same in (save, workshop.model_dir):  # the run itself; the same weights in another format
        done = megatron_vl(*given, "--save", save, "--load", same, "--dry-run")
        assert "was trained with lr 0.001" in done.err, done.text
    # Rows of one sample over two stages.
    run = (*given, "--load", other, "--pp", 2, "--micro-batch-size", 2, "--global-batch-size", 4,
           "--packing-buffer-size", 0, "--no-report", "--num-workers", 0, "--nproc-per-node", 2)
    done = megatron_vl(*run, "--eval-iters", 1, "--train-iters", 1)
    assert done.code == 0 and "nothing of this run will be kept" in done.out, done.text
    assert "at most 256 tokens, no longer than a microbatch needs" in done.out, done.out
    assert "steps; bfloat16, as config.json says" in done.out, done.out
    early = ("--train-iters", 3, "--exit-duration-in-mins", "1e-6", "--eval-iters", 0)
    done = megatron_vl(*run, *early, "--save", tmp_path / "early")
    assert "exit-duration-in-mins is 1e-06; 1 steps are done" in done.out, done.text
    assert "so nothing is validated" in done.out and (tmp_path / "early/iter_0000001").is_dir()


def test_whole_vision_towers_start_alike_and_resume_alike_and_elsewhere(workshop):
    # Of weights that are drawn at random, each rank draws its own; only one rank's are saved.
    changes = dict(
        TP=2, PP=1, PRETRAIN_CHECKPOINT_PATH="none", TRAIN_ITERS=4, SAVE_INTERVAL=2,
        extra=f"--vit-data-parallel --nproc-per-node 4 --hf-config {workshop.model_dir}",
    )
    done = workshop.train("whole", **changes)
    assert done.code == 0, done.text
    undisturbed = workshop.steps("whole")
    assert all(0.5 < step["vision_balance"] <= 1 for step in undisturbed.values())
    assert "vision balance" in done.out
    save = workshop.checkpoint("whole")
    (save / "latest_checkpointed_iteration.txt").write_text("2\n")
    elsewhere = shutil.copytree(save, workshop.root / "whole-elsewhere")
    done = workshop.train("whole", **changes)
    assert done.code == 0 and "2 steps done" in done.out, done.text
    assert losses(workshop.steps("whole")) == losses(undisturbed)
    # The tower is saved once, whole: a layout that cuts it takes it as any other.
    changes["extra"] = f"--nproc-per-node 4 --save {elsewhere}"
    done = workshop.train("whole-elsewhere-out", **changes)
    assert done.code == 0 and "2 steps done" in done.out, done.text
    cut = losses(workshop.steps("whole-elsewhere-out"))
    assert cut == pytest.approx(losses(undisturbed)[2:], rel=FP32)


def test_ten_steps_over_an_uneven_pipeline_follow_those_of_one_rank(uneven_run, plain_run):
    follows(uneven_run, plain_run)


def test_a_run_resumes_in_another_layout(workshop, uneven_run):
    save = shutil.copytree(workshop.checkpoint("uneven"), workshop.root / "moved")
    (save / "latest_checkpointed_iteration.txt").write_text("5\n")
    # Same SAVE, TP2 instead of PP2: torch_dist reshards model and optimizer state.
    metrics = workshop.root / "moved.jsonl"
    done = workshop.train("moved-out", TP=2, PP=1, PRETRAIN_CHECKPOINT_PATH="none",
                          extra=f"--save {save} --metrics-file {metrics}")
    assert done.code == 0, done.text
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    again = [r["loss"] for r in records if r["kind"] == "train"]
    assert again == pytest.approx(losses(uneven_run)[5:], rel=FP32)


def test_a_run_resumed_from_an_earlier_iteration_repeats_it_exactly(workshop, uneven_run):
    shutil.copytree(workshop.root / "uneven", workshop.root / "repeated")
    save = workshop.checkpoint("repeated")
    # As users do: choose the iteration by editing the file, and start the same command again.
    (save / "latest_checkpointed_iteration.txt").write_text("5\n")
    shutil.rmtree(save / "iter_0000010")
    done = workshop.train("repeated", PP=2, PRETRAIN_CHECKPOINT_PATH=workshop.weights(1, 2, 1))
    assert done.code == 0, done.text
    assert "5 steps done" in done.out
    assert "iteration  6/10" in done.out and "iteration  5/10" not in done.out
    # Model, optimizer, schedule and data order all came back.
    assert losses(workshop.steps("repeated")) == losses(uneven_run)


def test_two_data_ranks_see_other_rows_and_their_checkpoint_resumes(workshop, plain_run):
    card = workshop.root / "card.json"
    card.write_text(json.dumps({"like": "16g"}))  # on which two data ranks are best
    changes = dict(extra=f"--nproc-per-node 2 --gpu {card}", TRAIN_ITERS=4, SAVE_INTERVAL=2,
                   TP="auto", PP="auto", CP="auto",
                   PRETRAIN_CHECKPOINT_PATH=workshop.weights(1, 1))
    done = workshop.train("dp2", **changes)
    assert done.code == 0 and "layout auto: TP1xPP1xDP2, by prediction" in done.out, done.text
    undisturbed = losses(workshop.steps("dp2"))
    assert len(list((workshop.checkpoint("dp2") / "iter_0000004").glob("loader_dp*.json"))) == 2
    (workshop.checkpoint("dp2") / "latest_checkpointed_iteration.txt").write_text("2\n")
    card.write_text(json.dumps({"like": "16g", "memory_gb": 0.001}))  # which would fit nothing
    done = workshop.train("dp2", **changes)
    assert done.code == 0 and "layout auto: TP1xPP1xDP2, as " in done.out, done.text
    assert "2 steps done" in done.out and "iteration 2/4" not in done.out
    assert "iteration 3/4" in done.out
    assert losses(workshop.steps("dp2")) == pytest.approx(undisturbed, rel=1e-6)
    # Four rows a step, two from each rank: other rows than one rank reads.
    assert losses(workshop.steps("dp2"))[0] != pytest.approx(plain_run[1]["loss"], rel=1e-6)


def home(workshop, name: str) -> dict[str, torch.Tensor]:
    """The published tensors of a trained checkpoint."""

    def convert(out) -> None:
        done = megatron_vl("convert", workshop.checkpoint(name), out, "--to", "hf")
        assert done.code == 0, done.text

    return load_file(workshop.shared.made(f"{name}-hf", convert) / "model.safetensors")


SPLITS = {  # how it is converted, and what the launcher is told of it
    "vp": (["--vp", 2], dict(PP=2), dict(MP_VP=2)),
    # The embedding and its copy, the head, are then on one rank,
    "vision over virtual stages": (
        ["--vp", 2, "--vit-pp-layers", "1,1,0,0", "--pp-layers", "0,2,1,1"], dict(PP=2),
        dict(MP_VP=2),
    ),
    # or on the second and on the third.
    "vision over two of three stages": (
        ["--vit-pp-layers", "1,1,0", "--pp-layers", "0,2,2"], dict(PP=3), {},
    ),
    # A chunk that only passes on what it gets: no weight, no gradient, no optimizer state.
    "an empty stage": (["--vit-pp-layers", "1,0,1,0", "--pp-layers", "0,0,2,2"], dict(PP=4), {}),
    "an empty virtual stage": (
        ["--vp", 2, "--pp-layers", "2,0,0,2"], dict(PP=2), dict(MP_VP=2),
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_trains_validates_and_goes_home(name, workshop, plain_run):
    options, layout, environment = SPLITS[name]
    weights = workshop.root / f"{name} weights"
    done = megatron_vl("convert", workshop.model_dir, weights, "--pp", layout["PP"], *options)
    assert done.code == 0, done.text
    done = shell(LAUNCHER, *words(
        **layout, DATASET_PATH=workshop.wds_dir, VALID_DATASET_PATH=workshop.wds_dir,
        PRETRAIN_CHECKPOINT_PATH=weights, OUTPUT_BASEPATH=workshop.root / name,
    ), MP_PACKING_BUFFER=32, **environment)
    assert done.code == 0, done.text
    follows(workshop.steps(name), plain_run)
    # Back home by layer numbers of their own: the same model, but for the key biases, whose
    # gradient is rounding that AdamW makes steps of.
    ours, plain = (home(workshop, one) for one in (name, "plain"))
    assert ours.keys() == plain.keys()
    for tensor in ours:
        if "k_proj.bias" not in tensor:
            torch.testing.assert_close(ours[tensor], plain[tensor], rtol=1e-3, atol=2e-3)
    assert "validation at iteration 10" in done.out


def test_a_run_may_be_lengthened_and_its_rates_changed_when_they_are_meant(workshop, plain_run):
    save = shutil.copytree(workshop.checkpoint("plain"), workshop.root / "longer")
    done = workshop.train("longer-out", TRAIN_ITERS=12, extra=f"--save {save} --exit-interval 11")
    assert done.code == 0 and "iteration 11/12" in done.out, done.text
    assert "exit-interval is 11; 11 steps are done, the same command goes on" in done.out
    assert (save / "iter_0000011").is_dir() and "iteration 12/12" not in done.out
    # Warmup 2, cosine from 1e-3 to 1e-4 over 12 where it was over 10.
    rate = workshop.steps("longer-out")[11]["lr"]
    assert rate == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi * 8 / 10)) / 2)
    assert (f"schedule ends after 12 steps, the checkpoint's after 10: the rate goes on at "
            f"{rate:.3e} instead of 1.000e-04") in done.out, done.out
    again = dict(TRAIN_ITERS=12, LR="2e-3", extra=f"--save {save}")
    done = workshop.train("longer-out", **again)
    assert done.code == 2 and "--override-opt-param-scheduler" in done.err, done.text
    again["extra"] += " --override-opt-param-scheduler"
    done = workshop.train("longer-out", **again)
    assert done.code == 0 and "iteration 12/12" in done.out, done.text
    expected = 1e-4 + (2e-3 - 1e-4) * (1 + math.cos(math.pi * 9 / 10)) / 2
    (file,) = (workshop.root / "longer-out" / "log").glob("*lr-2e-3*/metrics.jsonl")
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    assert [one["lr"] for one in steps if one["kind"] == "train"] == [pytest.approx(expected)]


def test_another_kind_of_optimizer_is_refused_on_resume(workshop, plain_run):
    save = workshop.checkpoint("plain")
    done = workshop.train("plain-out", TRAIN_ITERS=10, DO="false", extra=f"--save {save}")
    assert done.code == 2 and "--no-load-optim" in done.err, done.text
    assert "DO true but this run has false" in done.err


def test_finetuning_starts_from_the_weights_of_a_run_and_may_leave_its_optimizer(
    workshop, plain_run
):
    load = workshop.checkpoint("plain")
    changes = dict(PRETRAIN_CHECKPOINT_PATH=load, TRAIN_ITERS=3, SAVE_INTERVAL=2)
    changes["extra"] = "--finetune --no-save-optim --no-save-rng"
    done = workshop.train("tuned", **changes)
    assert done.code == 0 and "0 steps done" in done.out, done.text
    # The first rows again, by a model that has learnt.
    steps = workshop.steps("tuned")
    assert steps[1]["tokens"] == plain_run[1]["tokens"]
    assert steps[1]["loss"] < 0.95 * plain_run[1]["loss"]
    (workshop.checkpoint("tuned") / "latest_checkpointed_iteration.txt").write_text("2\n")
    done = workshop.train("tuned", **changes)
    assert done.code == 2 and "holds no optimizer state" in done.err, done.text
    changes["extra"] += " --no-load-optim"
    done = workshop.train("tuned", **changes)
    assert done.code == 0 and "iteration 3/3" in done.out, done.text


def test_float16_may_be_saved_and_resumed_while_the_loss_scale_is_still_too_large(
    workshop, plain_run
):
    changes = dict(PR="fp16", TRAIN_ITERS=6, SAVE_INTERVAL=2, LR_WARMUP_ITERS=0,
                   extra="--initial-loss-scale 20000000")
    done = workshop.train("fp16", **changes)
    assert done.code == 0, done.text
    undisturbed = workshop.steps("fp16")
    # The scale is halved from the second overflow on; a skipped update leaves the weights alone.
    assert undisturbed[1]["skipped"] and undisturbed[2]["skipped"]
    assert undisturbed[1]["loss"] == pytest.approx(plain_run[1]["loss"], rel=2e-3)
    (workshop.checkpoint("fp16") / "latest_checkpointed_iteration.txt").write_text("2\n")
    done = workshop.train("fp16", **changes)
    assert done.code == 0 and "2 steps done" in done.out, done.text
    assert losses(workshop.steps("fp16")) == losses(undisturbed)


def test_bfloat16_follows_float32_and_resumes_without_the_distributed_optimizer(
    workshop, plain_run
):
    changes = dict(PR="bf16", AC="sel", DO="false")
    done = workshop.train("bf16", **changes)
    assert done.code == 0, done.text
    undisturbed = losses(workshop.steps("bf16"))
    assert undisturbed == pytest.approx(losses(plain_run), rel=0.02)
    (workshop.checkpoint("bf16") / "latest_checkpointed_iteration.txt").write_text("5\n")
    done = workshop.train("bf16", **changes)
    assert done.code == 0 and "5 steps done" in done.out, done.text
    assert losses(workshop.steps("bf16")) == undisturbed


def test_a_trained_checkpoint_converts_back_with_every_weight_changed(workshop, plain_run):
    before = load_file(workshop.model_dir / "model.safetensors")
    after = home(workshop, "plain")
    assert before.keys() == after.keys()
    # A key bias moves every score of a query alike: its gradient is zero, up to rounding.
    still = [n for n in before if torch.equal(before[n], after[n]) and "k_proj.bias" not in n]
    assert not still
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(workshop.root / "plain-hf")
    assert model.config.model_type == "qwen2_vl"


def test_a_config_file_means_the_same_as_flags_and_is_beaten_by_them(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("lr: 3e-4\nmin-lr: 1e-5\ntrain_iters: 7\nbf16: true\n")
    done = megatron_vl("train", "--config", config, "--train-iters", 9, "--show-config")
    assert done.code == 0, done.text
    assert "lr: 0.0003" in done.out and "train_iters: 9" in done.out and "bf16: true" in done.out


BALANCED = ["--moe-router-load-balancing-type", "global_aux_loss", "--moe-aux-loss-coeff", "0.1"]
LOAD = ("expert_load_max", "expert_load_min", "load_balancing_loss")


@pytest.mark.parametrize("model", ["text_model_dir", "experts_model_dir"])
def test_a_text_model_trains_alike_in_every_layout_resumes_and_goes_home(
    model, text_wds_dir, tmp_path, request
):
    import transformers

    model_dir = request.getfixturevalue(model)
    given = ["train", "--load", model_dir, "--train-data-path", text_wds_dir, "--lr", "1e-2",
             "--seq-length", 128, "--packing-buffer-size", 32, "--global-batch-size", 4,
             "--train-iters", 8, "--save-interval", 4, "--no-report",
             *(BALANCED if model == "experts_model_dir" else [])]
    wide = ["--tp", 2, "--pp", 2, "--sequence-parallel", "--nproc-per-node", 4]
    apart = ["--ep", 2, "--etp", 1] if model == "experts_model_dir" else []
    runs = {"one": ([], None), "resumed": ([], "one"), "four": ([*wide, *apart], None)}
    if apart:  # and where an optimizer of their own has updated the experts, or is to
        runs |= {"joined": ([], "four"), "parted": ([*wide, *apart], "one")}
    found = {}
    for name, (layout, of) in runs.items():
        if of is not None:
            last = shutil.copytree(tmp_path / of, tmp_path / name) / "iter_0000008"
            last.rename(tmp_path / f"{name} without a break")
            (last.parent / "latest_checkpointed_iteration.txt").write_text("4")
        done = megatron_vl(*given, *layout, "--save", tmp_path / name)
        assert done.code == 0 and not re.search("vision|image", done.out), done.text
        assert ("resumed from" in done.out) == (of is not None), done.text
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found[name] = {r["iteration"]: r for r in map(json.loads, lines) if r["kind"] == "train"}
    for name in found:
        follows(found[name], found["one"])
    assert losses(found["resumed"]) == losses(found["one"])
    for step, one in found["four"].items() if model == "experts_model_dir" else ():
        assert [one[name] for name in LOAD] == pytest.approx(
            [found["one"][step][name] for name in LOAD], rel=1e-5)
    done = megatron_vl("verify", tmp_path / "one", tmp_path / "resumed")
    assert done.code == 0, done.text
    assert found["one"][8]["loss"] < 0.8 * found["one"][1]["loss"]
    done = megatron_vl("convert", tmp_path / "four", tmp_path / "hf", "--to", "hf")
    assert done.code == 0 and "warning" not in done.text, done.text
    _, wrong = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(wrong.values()), wrong
    before = load_file(model_dir / "model.safetensors")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before)


def test_what_fills_a_gated_tower_up_stays_zero(window_model_dir, wds_dir, tmp_path):
    done = megatron_vl(
        "train", "--hf-config", window_model_dir, "--train-data-path", wds_dir, "--seq-length", 256,
        "--packing-buffer-size", 32, "--global-batch-size", 4, "--train-iters", 10, "--lr", "1e-2",
        "--weight-decay", "0.1", "--tp", 2, "--nproc-per-node", 2, "--use-distributed-optimizer",
        "--save", tmp_path / "run", "--no-report",
    )
    assert done.code == 0, done.text
    reader = FileSystemReader(tmp_path / "run" / "iter_0000010")
    found = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in reader.read_metadata().state_dict_metadata.items()
        if name.split("layers.mlp.linear_")[-1] in ("fc1.weight", "fc1.bias", "fc2.weight")
        and "vision_model" in name
    }
    load(found, storage_reader=reader)
    ffn = json.loads((window_model_dir / "config.json").read_text())["vision_config"][
        "intermediate_size"]
    stored = -(-ffn // 16) * 16
    assert ffn < stored and len(found) == 3 * 4, "weights, and the optimizer's three of each"
    for name, tensor in found.items():
        # [layers, 2 x stored ..] of gate and up, [layers, width, stored] of what comes behind.
        parts = tensor if "fc2" in name else tensor.unflatten(1, (2, stored)).movedim(2, -1)
        assert parts[..., :ffn].any() and not parts[..., ffn:].any(), name
