"""Real runs on images, videos and text: who decodes, what is left out, where a run goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter

import pytest
from commands import ROOT, megatron_vl
from common_forms import in_the_other_form
from distributed_launch import Workshop

RUN = {  # of a run on the mixed dataset
    "--seq-length": 512, "--packing-buffer-size": 32, "--shuffle-buffer-size": 30,
    "--global-batch-size": 4, "--train-iters": 4, "--lr": "1e-3", "--save-interval": 2,
    "--eval-interval": 0, "--num-workers": 1, "--log-interval": 1,
}


class Runs:
    """Trains one tiny model on the mixed dataset."""

    def __init__(self, root, workshop: Workshop, data):
        self.root, self.workshop, self.data = root, workshop, data

    def words(self, name, *, tp=1, pp=1, dp=1, weights=None, **changes) -> list:
        options = {
            **RUN, "--load": weights or self.workshop.weights(tp, pp),
            "--train-data-path": self.data, "--save": self.root / name,
            "--metrics-file": self.root / f"{name}.jsonl", "--nproc-per-node": tp * pp * dp,
            "--tensor-model-parallel-size": tp, "--pipeline-model-parallel-size": pp,
        }  # fmt: skip
        options |= {f"--{flag.replace('_', '-')}": value for flag, value in changes.items()}
        given = [pair for pair in options.items() if pair[1] is not None]
        return ["train", "--no-report", *(word for pair in given for word in pair)]

    def train(self, name, *, environment=None, code=0, **changes):
        done = megatron_vl(*self.words(name, **changes), **(environment or {}))
        assert done.code == code, done.text
        return done

    def steps(self, name) -> dict[int, dict]:
        lines = (self.root / f"{name}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {r["iteration"]: r for r in records if r["kind"] == "train"}


@pytest.fixture(scope="module")
def runs(workshop, mixed_dir) -> Runs:
    return Runs(workshop.root, workshop, mixed_dir)


@pytest.fixture(scope="module")
def two_data_ranks(runs, shared) -> dict[int, dict]:
    """Two data-parallel ranks with one worker each, saved after two of four steps."""
    shared.made("mixed dp2", lambda out: runs.train(out.name, dp=2))
    return runs.steps("mixed dp2")


def losses(steps):
    return {i: step["loss"] for i, step in steps.items()}


def test_one_rank_of_a_replica_reads_and_decodes_each_image_once(runs, tmp_path):
    """TP2 PP2: ranks 0 and 1 hold the vision tower, 2 and 3 do not."""
    count = tmp_path / "count"
    path = os.pathsep.join([str(ROOT / "tests/distributed/counting"), str(ROOT)])
    runs.train("counted", tp=2, pp=2, save=tmp_path / "out",
               environment={"COUNT_DECODES": count, "PYTHONPATH": path})
    ranks = Counter(count.read_text().split())
    steps = runs.steps("counted").values()
    assert sum(step["images"] for step in steps) > 20
    assert list(ranks) == ["0"], "only the reader decodes"
    # A video of the dataset is a folder of six frames, of which all are opened, or an mp4 of none;
    # a row or two more than were trained wait in the worker.
    trained, ahead = sum(step["images"] for step in steps), 4 * 512 // 20
    assert ranks["0"] <= 6 * (trained + ahead)


@pytest.mark.parametrize("change", ["two ranks to one", "one rank to two"])
def test_a_run_goes_on_with_another_number_of_data_ranks(runs, two_data_ranks, change):
    """The reading processes keep their places, so every step sees the same rows as undisturbed."""
    if change == "two ranks to one":
        start, go_on = dict(dp=2), dict(dp=1, num_workers=2)
    else:
        start, go_on = dict(dp=1, num_workers=2), dict(dp=2)
    name = change.replace(" ", "-")
    if "dp" in start and start["dp"] == 1:
        runs.train(name, **start)
        assert losses(runs.steps(name)) == pytest.approx(losses(two_data_ranks), rel=1e-5)
    else:
        shutil.copytree(runs.root / "mixed dp2", runs.root / name)
    (runs.root / name / "latest_checkpointed_iteration.txt").write_text("2\n")
    shutil.rmtree(runs.root / name / "iter_0000004")
    (runs.root / f"{name}.jsonl").unlink(missing_ok=True)
    done = runs.train(name, **go_on)
    assert "2 steps done" in done.out
    again = losses(runs.steps(name))
    assert sorted(again) == [3, 4]
    assert again == pytest.approx({i: two_data_ranks[i]["loss"] for i in (3, 4)}, rel=1e-5)


def test_a_run_goes_on_from_a_checkpoint_in_the_form_of_another_megatron_core(runs, two_data_ranks):
    """Its layout, options and random state lie elsewhere; the optimizer goes on as it was."""
    save = shutil.copytree(runs.root / "mixed dp2", runs.root / "other form")
    (save / "latest_checkpointed_iteration.txt").write_text("2\n")
    shutil.rmtree(save / "iter_0000004")
    in_the_other_form(save / "iter_0000002")
    done = runs.train("other form", dp=2)
    assert "2 steps done" in done.out
    want = {i: two_data_ranks[i] for i in (3, 4)}
    found = runs.steps("other form")
    assert losses(found) == losses(want)
    assert {i: found[i]["lr"] for i in found} == {i: want[i]["lr"] for i in want}
    done = runs.train("other form", dp=2, lr="2e-3", train_iters=6, code=2)
    assert "was trained with lr 0.001 but this run has 0.002" in done.err


def test_a_run_of_an_epoch_of_packed_rows_ends_when_all_was_read_also_after_a_break(runs):
    """How many steps that takes is forecast, for the schedule; what was read is counted."""
    epoch = dict(num_train_epochs=1, train_iters=None, dp=2, lr_warmup_fraction=0.2)
    done = runs.train("epoch", **epoch)
    steps = runs.steps("epoch")
    read = [step["samples"] + sum(step["skipped_samples"].values()) for step in steps.values()]
    assert sum(read[:-1]) < 126 <= sum(read)
    assert [step["epoch"] for step in steps.values()] == pytest.approx(
        [sum(read[: i + 1]) / 126 for i in range(len(read))])
    assert f", 'epoch': {sum(read) / 126:.2f}}} | " in done.out
    forecast = int(re.search(r"; 1 epoch, about (\d+) steps by a forecast", done.out)[1])
    assert abs(forecast - len(steps)) <= 1
    assert "nothing to do" in runs.train("epoch", **epoch).out
    save = runs.root / "epoch"
    (save / "latest_checkpointed_iteration.txt").write_text("2\n")
    for path in save.glob("iter_*"):
        if path.name != "iter_0000002":
            shutil.rmtree(path)
    done = runs.train("epoch", **epoch)
    assert "2 steps done" in done.out
    again = runs.steps("epoch")
    assert {i: (one["loss"], one["epoch"], one["lr"]) for i, one in again.items()} == {
        i: (one["loss"], one["epoch"], one["lr"]) for i, one in steps.items()}


def test_a_number_of_readers_that_cannot_be_dealt_is_refused(runs, two_data_ranks):
    save = shutil.copytree(runs.root / "mixed dp2", runs.root / "refused")
    (save / "latest_checkpointed_iteration.txt").write_text("2\n")
    done = runs.train("refused", code=2, dp=1, num_workers=1)
    assert "read by 2 processes (2 data-parallel ranks) but this run has 1 x 1" in done.err
    assert "give --num-workers 2" in done.err


REPLAYS = {  # how step 4 is run again, from the checkpoint of step 2; whether to the bit
    "its own layout": ([], True),
    "TP2, one data rank": (["--tp", 2, "--dp", 1, "--rank", 1, "--device", "cpu"], False),
}


@pytest.mark.parametrize("name", REPLAYS)
def test_a_replayed_step_is_the_run_s(name, runs, two_data_ranks, tmp_path):
    more, to_the_bit = REPLAYS[name]
    save, page = runs.root / "mixed dp2", tmp_path / "page.html"
    before = {path: path.stat().st_mtime_ns for path in save.rglob("*")}
    done = megatron_vl("replay", save, 4, "--out", page, *more)
    assert done.code == 0, done.text
    was = two_data_ranks[4]
    said = dict(re.findall(r"^(loss|grad_norm) +(\S+) \(the run", done.out, re.M))
    for key, number in said.items():
        assert float(number) == pytest.approx(was[key], rel=1e-5)
    assert len(said) == 2, done.out
    if to_the_bit:
        assert done.out.count(", equal)") == 2, done.out
    assert f"step 3/4: loss {two_data_ranks[3]['loss']:.5f}"[:-1] in done.out
    # The layers' norms are the whole's; the rows are those of the ranks that are asked for.
    layers = re.findall(r"^  (\S+) +(?:vision|language)_model", done.out.split("largest")[0], re.M)
    whole = sum(float(one) ** 2 for one in layers) ** 0.5
    assert whole == pytest.approx(was["grad_norm"], rel=1e-4)
    rows = re.findall(r"row (\d) of data-parallel rank (\d): loss", done.out)
    assert {rank for _, rank in rows} == ({"0", "1"} if to_the_bit else {"1"})
    assert len(rows) == (4 if to_the_bit else 2)
    keys = re.findall(r"^    \S+ +(\S+\.tar/\S+)$", done.out, re.M)
    assert len(keys) == was["samples"] if to_the_bit else 0 < len(keys) < was["samples"]
    assert keys[0] in page.read_text() and "data:image/png" in page.read_text()
    assert before == {path: path.stat().st_mtime_ns for path in save.rglob("*")}


def test_a_step_that_cannot_be_replayed_is_refused(runs, two_data_ranks, tmp_path):
    save = runs.root / "mixed dp2"
    for words, why in (
        ([2], "has no checkpoint before step 2; those there are of iterations 2, 4; give a STEP"),
        ([9], "is a run of 4 steps and STEP is 9"),
        ([4, "--dp", 4], "--dp is 4, and the run's rows are those of 2 data-parallel ranks"),
        ([4, "--rank", 2], "--rank is 2 but the run has ranks 0 to 1"),
        ([4, "--load", save], "so --load is not read; leave it out"),
        ([4, "--out", save / "x.html"], "where nothing is written"),
        ([4, "--train-data-path", tmp_path / "gone"], "gone does not exist"),
    ):
        done = megatron_vl("replay", save, *words)
        assert done.code == 2 and why in done.err, done.text


def test_options_that_changed_where_no_checkpoint_is_left_are_said(runs, two_data_ranks, tmp_path):
    from megatron_vl.training.replay.source import find_replay

    save = shutil.copytree(runs.root / "mixed dp2", tmp_path / "run")
    metrics = shutil.copy(runs.root / "mixed dp2.jsonl", save / "metrics.jsonl")
    start = next(one for one in map(json.loads, metrics.read_text().splitlines())
                 if one["kind"] == "run")
    asked = dict(dp=None, rank=None, on_cpu=True)
    assert find_replay(save, 4, {}, **asked).note == ""
    again = start | {"done": 3, "options": start["options"] | {"lr": 0.5, "save_interval": 3}}
    with metrics.open("a") as file:
        file.write(json.dumps(again) + "\n")
    note = find_replay(save, 4, {}, **asked).note
    assert "at step 3 the run went on with another lr, and its checkpoint is gone" in note


def test_a_run_killed_between_saves_repeats_itself_exactly(runs, two_data_ranks):
    """SIGKILL to every rank after the third step; the same command goes on after the second."""
    words = [str(word) for word in runs.words("killed", dp=2)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([sys.executable, "-m", "megatron_vl", *words], cwd=ROOT, env=env,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    for line in job.stdout:
        if line.startswith("iteration 3/4"):
            break
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    (runs.root / "killed" / "latest_checkpointed_iteration.txt").write_text("2\n")
    done = runs.train("killed", dp=2)
    assert "2 steps done" in done.out
    assert losses(runs.steps("killed")) == losses(two_data_ranks)


def damaged(data, out):
    """A copy with one image cut to nothing, its size in the index unchanged."""
    shutil.copytree(data, out)
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            victim = next((m for m in tar if m.name.endswith("-0.0.png")), None)
        if victim is not None:  # one small image, one turn
            break
    content = bytearray(shard.read_bytes())
    content[victim.offset_data : victim.offset_data + victim.size] = bytes(victim.size)
    shard.write_bytes(content)
    return f"{shard.name}/{victim.name.split('.')[0]}"


def test_samples_that_cannot_be_used_are_left_out_counted_and_named(runs, tmp_path):
    key = damaged(runs.data, tmp_path / "data")
    changes = dict(train_data_path=tmp_path / "data", save=tmp_path / "out", train_iters=30,
                   seq_length=64, save_interval=100)
    done = runs.train("skips", **changes)
    left_out = Counter()
    for step in runs.steps("skips").values():
        left_out.update(step["skipped_samples"])
    assert set(left_out) == {"too long", "unusable media"}
    named = re.findall(r"skipped sample (\S+): (.*)", done.out)
    assert any(name == key and "not in a format" in why
               for name, why in named)
    assert any("tokens but a row holds 64" in why for _, why in named)
    assert re.search(r"\d+ samples? left out \(\d+ too long", done.out)
    shutil.rmtree(tmp_path / "out")
    done = runs.train("too-many", code=2, **changes, max_skipped_samples=1)
    assert "could not be used" in done.err or "cannot be used" in done.err
    assert "max-skipped-samples" in done.err


def test_a_loss_that_is_not_finite_is_skipped_and_names_the_samples_of_its_row(runs, tmp_path):
    import torch

    weights = shutil.copytree(runs.workshop.weights(1, 2), tmp_path / "weights")
    file = weights / "release" / "mp_rank_00_000" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["model"]["vision_model.patch_embed.proj.weight"][0] = float("nan")
    torch.save(content, file)
    done = runs.train(
        "nan", code=2, pp=2, weights=weights, save=tmp_path / "out", max_skipped_steps=2
    )
    named = "the loss is not finite; the samples of its row are shard-"
    skipped = [line for line in done.out.splitlines() if line.startswith("skipped iteration")]
    assert [named in line for line in skipped] == [True, True]
    assert skipped[1].endswith("(2 of at most 2 skipped steps)")
    assert f"iteration 3: {named}" in done.err and "more than max-skipped-steps 2" in done.err
    assert "Traceback" not in done.err
    # A step that is skipped uses up neither the rate's schedule nor the weights.
    steps = runs.steps("nan")
    assert [steps[i]["skipped"] for i in (1, 2, 3)] == [True] * 3
    assert len({step["lr"] for step in steps.values()}) == 1
    # Run again, only the samples with images are to blame; the page shows them.
    done = megatron_vl("replay", tmp_path / "out", 3, "--out", tmp_path / "nan.html")
    assert done.code == 0, done.text
    assert "first output that is not finite: vision_model.patch_embed.proj, " in done.out
    found = dict(reversed(line.split()) for line in done.out.splitlines() if ".tar/" in line)
    bad = [name for name, loss in found.items() if loss == "nan"]
    assert "nan (the run: nan, equal)" in done.out and 0 < len(bad) < len(found), done.out
    shown = (tmp_path / "nan.html").read_text()
    assert f"{bad[0]}: loss nan" in shown and "<img " in shown
    # Under fp16 an overflow skips a step as well; this is none, and no lower scale mends it.
    done = runs.train(
        "nan fp16", code=2, pp=2, weights=weights, max_skipped_steps=0,
        environment={"MEGATRON_VL_FP16": "true"},
    )
    assert f"iteration 1: {named}" in done.err, done.text


def test_a_validation_that_fails_costs_nothing_that_is_written_behind_training(runs, tmp_path):
    entry = {"conversations": [{"from": "human", "value": "say"},
                               {"from": "gpt", "value": "word " * 600}]}
    (tmp_path / "long.json").write_text(json.dumps([entry] * 4))
    made = megatron_vl("prepare", tmp_path / "long.json", tmp_path / "long", "--format", "sharegpt",
                       "--split", "1,1,0", "--quiet")
    assert made.code == 0, made.text
    done = runs.train(
        "untrained", code=2, valid_data_path=tmp_path / "long", max_skipped_samples=100,
        eval_interval=4, environment={"MEGATRON_VL_ASYNC_SAVE": "true"},
    )
    assert "the validation split has no trained token" in done.err, done.text
    assert (runs.root / "untrained" / "iter_0000004" / "SHA256SUMS").is_file()
