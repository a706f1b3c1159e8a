"""Real runs that are killed, stopped, damaged, short of disk: what is lost, and what is said."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil
import pytest
from commands import ROOT, Done, megatron_vl

INTERVAL = 5  # steps between checkpoints


class Run:
    """One command, given again and again."""

    def __init__(self, root: Path, workshop, **options: object):
        self.metrics, self.log = root / "metrics.jsonl", root / "log"
        root.mkdir(parents=True, exist_ok=True)
        options = {
            "load": workshop.weights(1, 2), "train-data-path": workshop.wds_dir,
            "pipeline-model-parallel-size": 2, "seq-length": 256, "packing-buffer-size": 32,
            "global-batch-size": 4, "train-iters": 20, "lr": "1e-3", "lr-decay-iters": 40,
            "eval-interval": 0,
            "save": root / "save", "save-interval": INTERVAL, "metrics-file": self.metrics,
            "num-workers": 1, **{name.replace("_", "-"): one for name, one in options.items()},
        }
        self.save = Path(options["save"])
        self.words = ["train", "--use-distributed-optimizer"]
        for name, value in options.items():
            if isinstance(value, bool):
                self.words.append(f"--{name}" if value else f"--no-{name}")
            else:
                self.words += [f"--{name}", value]

    def start(self, launcher=("-m", "megatron_vl")) -> psutil.Popen:
        """All it says goes to `self.log`: a pipe that nobody reads would stop it."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("a") as log:
            return psutil.Popen(
                [sys.executable, *map(str, [*launcher, *self.words])], env=env, stdout=log,
                stderr=subprocess.STDOUT,
            )

    def finish(self, *more: object) -> Done:
        return megatron_vl(*self.words, *more)

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def records(self) -> list[dict]:
        """Of every step, also those done twice, in the order they were done.

        A last line without its end is one that the run is writing.
        """
        text = self.metrics.read_text() if self.metrics.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        return [one for one in map(json.loads, lines) if one["kind"] == "train"]

    @property
    def losses(self) -> dict[int, float]:
        return {one["iteration"]: one["loss"] for one in self.records}

    @property
    def iterations(self) -> list[int]:
        return sorted(int(one.name[5:]) for one in self.save.glob("iter_*"))

    def wait_for(self, job: psutil.Popen, what, patience: float = 120) -> None:
        """Until `what()` is true or the job has ended."""
        deadline = time.monotonic() + patience
        while not what() and job.poll() is None:
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(shared, workshop) -> Run:
    def train(out: Path) -> None:
        done = Run(out, workshop, train_iters=40).finish()
        assert done.code == 0, done.text

    return Run(shared.made("undisturbed", train), workshop, train_iters=40)


def ranks(job: psutil.Popen) -> list[psutil.Process]:
    return [one for one in job.children() if "megatron_vl" in one.cmdline()]


def kill(*processes: psutil.Process) -> None:
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


MOMENTS = {  # (behind training, kills by what they hit): each once; soak.py kills for hours
    "at once": (False, ["a rank", "every rank", "the launcher too", "a save"]),
    "behind training": (True, ["a save", "a rank", "the launcher"]),
}


@pytest.mark.parametrize(("behind", "kills"), MOMENTS.values(), ids=MOMENTS)
def test_a_run_killed_at_random_moments_loses_little_and_ends_as_undisturbed(
    behind, kills, undisturbed, workshop, tmp_path
):
    chance = random.Random(7)
    run = Run(tmp_path, workshop, train_iters=40, max_restarts=100, async_save=behind)
    job = run.start()
    for what in kills:
        seen = len(run.records)
        run.wait_for(job, lambda seen=seen: len(run.records) > seen)
        if what == "a save":
            run.wait_for(job, lambda: any(run.save.glob(".iter_*.partial")))
            time.sleep(chance.uniform(0, 0.5))
        else:
            time.sleep(chance.uniform(0, 1.5))
        if job.poll() is not None:
            break  # done before we could
        hit = ranks(job)
        if what != "the launcher":
            kill(*(chance.sample(hit, 1) if hit and what in ("a rank", "a save") else hit))
        if what in ("the launcher", "the launcher too"):
            kill(job)
            job.wait()
            job = run.start()
    else:
        what = None
    assert job.wait(timeout=300) == 0, run.said
    assert what is None, f"the run was over before {what}"
    assert run.losses == undisturbed.losses
    # What each start did again.
    numbers = [one["iteration"] for one in run.records]
    furthest, again = 0, []
    for before, now in pairwise([0, *numbers]):
        if now <= before:
            again.append(furthest - now + 1)
        furthest = max(furthest, now)
    # Written behind training a checkpoint is there only some steps later.
    assert max(again) <= (2 if behind else 1) * INTERVAL, again
    assert not list(run.save.glob(".iter_*")), "what a killed save left was written anew"


def test_ranks_end_with_their_launcher(workshop, tmp_path):
    run = Run(tmp_path, workshop, train_iters=10_000)
    job = run.start()
    run.wait_for(job, lambda: run.records)
    left = ranks(job)
    kill(job)
    job.wait()
    _, alive = psutil.wait_procs(left, timeout=10)
    kill(*alive)
    assert len(left) == 2 and not alive, run.said


def test_ranks_that_torchrun_itself_starts_again_go_on(undisturbed, workshop, tmp_path):
    run = Run(tmp_path, workshop)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                "--max-restarts", 1, "--monitor-interval", 0.1, "-m", "megatron_vl"]
    job = run.start(launcher)
    run.wait_for(job, lambda: 5 in run.iterations)
    kill(ranks(job)[1])
    assert job.wait(timeout=120) == 0, run.said
    assert "5 steps done" in run.said or "10 steps done" in run.said
    assert run.losses == {i: loss for i, loss in undisturbed.losses.items() if i <= 20}


def test_checkpoints_written_behind_training_hold_the_same(undisturbed, workshop, tmp_path):
    run = Run(tmp_path, workshop, train_iters=15, async_save=True, save_total_limit=2)
    done = run.finish()
    assert done.code == 0, done.text
    assert run.losses == {i: loss for i, loss in undisturbed.losses.items() if i <= 15}
    assert run.iterations == [10, 15] and "deleted iterations 5" in done.out
    check = ["sha256sum", "-c", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=run.save / "iter_0000010").returncode == 0
    # Saved while later steps ran, and all the same of step 10 alone.
    (run.save / "latest_checkpointed_iteration.txt").write_text("10\n")
    resumed = Run(tmp_path / "on", workshop, train_iters=12, save=run.save)
    done = resumed.finish()
    assert done.code == 0 and "10 steps done" in done.out, done.text
    assert resumed.losses == {i: undisturbed.losses[i] for i in (11, 12)}


def change_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {  # of the latest checkpoint -> what is said of it
    "a bit": ("__0_0.distcp", change_a_bit, "__0_0.distcp is not what was written"),
    "cut short": ("__1_0.distcp", lambda f: os.truncate(f, 1000), "is not what was written"),
    "a file gone": ("loader_dp00000.json", Path.unlink, "loader_dp00000.json is missing"),
    "no table": (".metadata", Path.unlink, "holds neither mp_rank_* directories nor .metadata"),
    "no checksums": ("SHA256SUMS", lambda f: f.write_text("?\n"), "SHA256SUMS is damaged"),
}


def test_a_damaged_checkpoint_falls_back_to_the_one_before(undisturbed, workshop, tmp_path):
    shutil.copytree(undisturbed.save, tmp_path / "save")
    run = Run(tmp_path, workshop, train_iters=17)
    damaged = dict(zip((40, 35, 30, 25, 20), DAMAGE.values(), strict=True))
    for iteration, (name, damage, _) in damaged.items():
        damage(run.save / f"iter_{iteration:07d}" / name)
    done = run.finish()
    assert done.code == 0, done.text
    said = [line for line in done.out.splitlines() if line.startswith("DAMAGED")]
    assert len(said) == len(DAMAGE)
    for iteration, (_, _, says) in damaged.items():
        (line,) = [one for one in said if f"iter_{iteration:07d}:" in one]
        assert says in line and line.endswith("going on from iter_0000015 instead")
    assert run.losses == {i: undisturbed.losses[i] for i in (16, 17)}


def test_a_run_without_any_whole_checkpoint_says_what_is_wrong_with_each(
    undisturbed, workshop, tmp_path
):
    shutil.copytree(undisturbed.save, tmp_path / "save")
    run = Run(tmp_path, workshop)
    for one in run.save.glob("iter_*/.metadata"):
        os.truncate(one, 100)
    done = run.finish()
    assert done.code == 2, done.text
    sentence = done.err.splitlines()[-1]
    assert sentence.count("iter_0000040") and sentence.count("iter_0000005")
    assert "restore one of them, or give another --save" in sentence


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_a_checkpoint_that_holds_a_program_is_refused_and_not_run(undisturbed, workshop, tmp_path):
    shutil.copytree(undisturbed.save, tmp_path / "save")
    run, canary = Run(tmp_path, workshop), tmp_path / "canary"
    latest = run.save / "iter_0000040"
    table = pickle.loads((latest / ".metadata").read_bytes())
    table.planner_data = Payload(canary)
    (latest / ".metadata").write_bytes(pickle.dumps(table))
    (latest / "SHA256SUMS").unlink()  # who can write the one can write the other
    done = run.finish()
    assert done.code == 2 and ".metadata holds more than data" in done.err, done.text
    assert not canary.exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_within_the_grace_period_and_ends_well(
    name, undisturbed, workshop, tmp_path
):
    run = Run(tmp_path, workshop, train_iters=40, save_interval=1000, export_hf=name == "SIGTERM")
    job = run.start()
    run.wait_for(job, lambda: len(run.records) > 2)
    asked = time.monotonic()
    job.send_signal(signal.Signals[name])
    assert job.wait(timeout=60) == 0, run.said
    assert time.monotonic() - asked < 30, "Kubernetes would have killed it"
    done = run.records[-1]["iteration"]
    assert run.iterations == [done] and done < 40
    assert f"asked to stop; {done} steps are done" in run.said
    assert not (run.save / "hf").exists()
    told = f"{run.save}/iter_{done:07d} is not exported, as the run is not at its end"
    assert (told in run.said) == (name == "SIGTERM")
    assert run.finish().code == 0
    assert run.losses == undisturbed.losses
    assert (run.save / "hf" / "model.safetensors").exists() == (name == "SIGTERM")


def test_a_rank_that_hangs_is_noticed_and_every_rank_says_where_it_is(workshop, tmp_path):
    run = Run(tmp_path, workshop, train_iters=100000, hang_timeout=3, max_restarts=0)
    job = run.start()
    run.wait_for(job, lambda: len(run.records) > 2)
    (victim,) = [one for one in ranks(job) if one.environ()["RANK"] == "1"]
    folder = run.save / "stacks"
    victim.suspend()
    # The other wakes it to hear where it is; when it has said so it is not to get on all the same.
    deadline = time.monotonic() + 90
    while job.poll() is None and time.monotonic() < deadline:
        try:
            woken = victim.status() != psutil.STATUS_STOPPED
            if woken and "training/loop.py" in (folder / "rank00001.txt").read_text():
                victim.suspend()
        except psutil.NoSuchProcess:
            break
        time.sleep(0.002)
    assert job.wait(timeout=60) == 1, run.said
    assert "no progress for" in run.said and "while training iteration" in run.said
    assert f"where every rank stood is in {folder}" in run.said
    for rank in (0, 1):
        stacks = (folder / f"rank{rank:05d}.txt").read_text()
        assert "most recent call first" in stacks and "training/loop.py" in stacks, stacks


@pytest.mark.parametrize("small_disk", ["24m"], indirect=True)
@pytest.mark.parametrize("behind", [False, True], ids=["at once", "behind training"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    behind, small_disk, undisturbed, workshop, tmp_path
):
    """Full in the middle of the large files, or to the last byte before anything is written."""
    run = Run(
        tmp_path, workshop, save=small_disk / "save", save_interval=4, async_save=behind
    )
    job = run.start()
    if not behind:
        run.wait_for(job, lambda: run.iterations)
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    # The last of them is the run's result: that it is missing is a failure.
    assert job.wait(timeout=300) == 2, run.said
    assert "the last checkpoint, of iteration 20, could not be saved" in run.said
    lost = [line for line in run.said.splitlines() if line.startswith("NOT SAVED")]
    assert lost and all("the disk is full" in line for line in lost), run.said
    assert all("; the checkpoints before it stay, training goes on" in line for line in lost)
    assert "starting all processes again" not in run.said
    assert run.losses == {i: loss for i, loss in undisturbed.losses.items() if i <= 20}
    assert run.iterations and run.iterations[-1] < 20
    assert not list(run.save.glob(".iter*")), "what was half written takes no room"
    # With room for it the same command goes on from what is there.
    newest = run.iterations[-1]
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    done = run.finish()
    assert done.code == 0 and f"{newest} steps done" in done.out, done.text
    assert run.iterations[-1] == 20
    assert run.losses == {i: loss for i, loss in undisturbed.losses.items() if i <= 20}


def test_a_gradient_that_is_far_larger_than_usual_changes_nothing(workshop, tmp_path):
    """Asked for at a factor that usual steps exceed, so that several are skipped."""
    run = Run(tmp_path, workshop, train_iters=24, skip_grad_spikes=1.05, save_interval=20)
    done = run.finish()
    assert done.code == 0, done.text
    norms, skipped = [], []
    for one in run.records:
        usual = median(norms) if len(norms) >= 16 else float("inf")
        assert one["skipped"] == (one["grad_norm"] > 1.05 * usual)
        if one["skipped"]:
            skipped.append(one["iteration"])
        else:
            norms.append(one["grad_norm"])
    assert skipped
    named = [line for line in done.out.splitlines() if line.startswith("skipped iteration")]
    assert len(named) == len(skipped)
    assert "times the usual" in named[0] and "its samples were shard-" in named[0]
    # The schedule stood still, and what is usual is part of the checkpoint.
    at = {one["iteration"]: one["lr"] for one in run.records}
    assert at[skipped[0] + 1] == at[skipped[0]]
    whole = run.losses
    (run.save / "latest_checkpointed_iteration.txt").write_text("20\n")
    again = run.finish()
    assert again.code == 0 and run.losses == whole
    limited = run.finish("--max-skipped-steps", 0, "--train-iters", 39)
    assert limited.code == 2 and "more than max-skipped-steps 0" in limited.err
