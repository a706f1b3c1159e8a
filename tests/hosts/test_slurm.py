"""Real Slurm daemons run examples/slurm/train.sbatch over two nodes, and disturb it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import ROOT

from hosts import slurm
from hosts.storage import wait_until

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not() or "runs"),
]
SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
STEPS = 600
CORES = 2  # of a task


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Run:
    """A run of two stages, one a node; `submit` gives the same command again and again."""

    def __init__(self, cluster: slurm.Slurm, root: Path, model: Path, data: Path):
        self.cluster, self.root = cluster, root
        root.mkdir()
        options = {
            "load": model, "train-data-path": data, "save": "save", "save-interval": 50,
            "pipeline-model-parallel-size": 2, "seq-length": 64, "packing-buffer-size": 16,
            "global-batch-size": 2, "train-iters": STEPS, "lr": 1e-3, "eval-interval": 0,
            "num-workers": 0, "metrics-file": "metrics.jsonl",
        }
        text = "".join(f"{name}: {value}\n" for name, value in options.items())
        (root / "run.yaml").write_text(text)

    def submit(self, *options: object) -> str:
        return self.cluster.submit(
            "--gpus-per-node=1", f"--cpus-per-task={CORES}", *options, SCRIPT, "run.yaml",
            cwd=self.root,
        )

    @property
    def said(self) -> str:
        return "".join(one.read_text() for one in sorted(self.root.glob("megatron-vl-*.log")))

    @property
    def steps(self) -> list[tuple[int, float]]:
        """Iteration and loss of every step, also of those done twice, in the order they were done;
        without a line that the run is writing."""
        file = self.root / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        records = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
        return [(one["iteration"], one["loss"]) for one in records if one["kind"] == "train"]

    def wait_for_steps(self, more: int = 5) -> None:
        seen = len(self.steps)
        self.wait_for(lambda: len(self.steps) >= seen + more)

    def wait_for(self, what, seconds: float = 120) -> None:
        try:
            wait_until(what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.said}") from error

    def wait_for_state(self, job: str, *states: str, seconds: float = 120) -> None:
        self.wait_for(lambda: self.cluster.state(job) in states, seconds)

    @property
    def latest(self) -> int:
        return int((self.root / "save" / "latest_checkpointed_iteration.txt").read_text())


@pytest.fixture
def new_run(cluster, tmp_path, text_model_dir, text_wds_dir):
    return lambda name: Run(cluster, tmp_path / name, text_model_dir, text_wds_dir)


def preempt(run: Run, job: str) -> None:
    run.cluster.submit("--partition=urgent", "--nodes=2", "--gpus-per-node=1", "--wrap=sleep 1",
                       cwd=run.root)
    run.wait_for_state(job, "PENDING")


def requeue(run: Run, job: str) -> None:
    run.cluster.said("scontrol", "requeue", job)
    run.wait_for_state(job, "PENDING")


def lose_a_node(run: Run, job: str) -> None:
    run.cluster.lose("n2")
    run.wait_for_state(job, "PENDING")
    run.cluster.restart("n2")


def test_a_job_that_slurm_disturbs_in_every_way_ends_as_an_undisturbed_one(cluster, new_run):
    calm, run = new_run("calm"), new_run("run")
    first = calm.submit()
    calm.wait_for_steps()
    step = cluster.said("scontrol", "show", "step", f"{first}.0")
    assert f"TRES=cpu={2 * CORES}," in step, "each task has the cores that the job asked for"
    calm.wait_for_state(first, "COMPLETED")
    assert [iteration for iteration, _ in calm.steps] == list(range(1, STEPS + 1))

    job = run.submit()
    for disturb, lost in ((preempt, 0), (requeue, 0), (lose_a_node, 50)):
        run.wait_for_steps()
        disturb(run, job)
        assert run.steps[-1][0] - run.latest <= lost, disturb
        run.wait_for_state(job, "RUNNING")
    run.wait_for_steps()
    cluster.said("scancel", job)
    run.wait_for_state(job, "CANCELLED")
    run.wait_for(lambda: run.latest == run.steps[-1][0])

    # The same command; signalled 50 seconds before the end of its first minute.
    job = run.submit("--time=1", "--signal=B:USR1@50")
    run.wait_for(lambda: "the time limit is near" in run.said)
    assert run.latest == run.steps[-1][0] < STEPS
    cluster.said("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    run.wait_for_state(job, "COMPLETED")
    assert cluster.facts(job)["Restarts"] == "1"
    assert dict(run.steps) == dict(calm.steps)
