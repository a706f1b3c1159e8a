"""The same bits at every run, after a resume too; the same numbers in another layout."""

from __future__ import annotations

import json
import shutil

import pytest
from commands import megatron_vl

SHORT = dict(TRAIN_ITERS=4, SAVE_INTERVAL=2)


def bits(steps: dict[int, dict]) -> list[tuple[float, float]]:
    return [(steps[i]["loss"], steps[i]["grad_norm"]) for i in sorted(steps)]


def go_back(save, iteration: int) -> None:
    (save / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")


def test_two_runs_and_a_resumed_one_give_the_same_bits(workshop):
    # TP2 PP2, the distributed optimizer, packed rows.
    changes = dict(TP=2, PP=2, SP="true", extra="--deterministic", **SHORT)
    for name in ("once", "twice"):
        done = workshop.train(name, **changes)
        assert done.code == 0, done.text
        assert "float32, deterministic" in done.out and "is not read" not in done.out
    once = bits(workshop.steps("once"))
    assert once == bits(workshop.steps("twice"))
    go_back(workshop.checkpoint("twice"), 2)
    done = workshop.train("twice", **changes)
    assert done.code == 0 and "2 steps done" in done.out, done.text
    assert "is not read: the run goes on from save" in done.out, "the weights it began with"
    assert once == bits(workshop.steps("twice"))


def test_optimizer_state_behind_a_padded_bucket_comes_back(wds_dir, tmp_path):
    """The tied embedding is a bucket by itself; what lies before it, one layer, is no multiple of
    128 numbers."""
    assert megatron_vl("tiny", tmp_path / "hf", "--hidden-size", 32, "--ffn-size", 32,
                       "--vision-hidden-size", 32, "--ranks", 1500, "--dtype", "float32").code == 0
    save, third = tmp_path / "save", []
    for name in ("whole", "again"):
        if name == "again":
            go_back(save, 2)
        metrics = tmp_path / f"{name}.jsonl"
        done = megatron_vl(
            "train", "--load", tmp_path / "hf", "--train-data-path", wds_dir, "--pp", 2,
            "--first-stage-layers", 1, "--use-distributed-optimizer", "--train-iters", 3,
            "--save-interval", 2, "--save", save, "--metrics-file", metrics, "--eval-interval", 0,
            "--seq-length", 256, "--packing-buffer-size", 16, "--micro-batch-size", 1,
            "--global-batch-size", 2, "--lr", 1e-2, "--lr-decay-style", "constant",
            "--num-workers", 0,
        )
        assert done.code == 0 and "corruption" not in done.text, done.text
        steps = [json.loads(line) for line in metrics.read_text().splitlines()]
        third += [(one["loss"], one["grad_norm"]) for one in steps
                  if one["kind"] == "train" and one["iteration"] == 3]
    assert len(third) == 2 and third[0] == third[1]


def test_a_checkpoint_of_two_tensor_ranks_goes_on_as_two_stages_and_as_two_data_ranks(workshop):
    # Two processes read the data in every layout.
    done = workshop.train("tp2", TP=2, extra="--num-workers 2", **SHORT)
    assert done.code == 0, done.text
    undisturbed = bits(workshop.steps("tp2"))
    for name, layout, extra in (
        ("as-pp2", dict(PP=2), "--num-workers 2"),
        ("as-dp2", {}, "--num-workers 1 --nproc-per-node 2"),
    ):
        save = shutil.copytree(workshop.checkpoint("tp2"), workshop.root / name)
        go_back(save, 2)
        metrics = workshop.root / f"{name}.jsonl"
        done = workshop.train(
            f"{name}-out", **layout, **SHORT, PRETRAIN_CHECKPOINT_PATH="none",
            extra=f"{extra} --save {save} --metrics-file {metrics}",
        )
        assert done.code == 0 and "2 steps done" in done.out, done.text
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        steps = {r["iteration"]: r for r in records if r["kind"] == "train"}
        assert sorted(steps) == [3, 4]
        for (loss, norm), (want, want_norm) in zip(bits(steps), undisturbed[2:], strict=True):
            assert loss == pytest.approx(want, rel=1e-5), name
            assert norm == pytest.approx(want_norm, rel=1e-4), name
