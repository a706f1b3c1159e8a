"""Runs of two hosts whose SAVE and data are on shared storage; each host has a cache of its own."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

from hosts import Hosts, storage
from hosts import why_not as no_hosts

_WHY = storage.why_not() or no_hosts()
pytestmark = [pytest.mark.hosts, pytest.mark.skipif(bool(_WHY), reason=_WHY or "runs")]
STALE = 20  # seconds
AWAY = 60  # seconds
STEPS = 120
NAMES = ("one", "two")


class Cluster:
    """Two hosts that see the same at `/mnt/shared`; each runs a stage."""

    mount = Path("/mnt/shared")

    def __init__(self, root: Path, model: Path, data: Path):
        (root / "hosts").mkdir()
        self.storage = storage.Storage(root / "storage")
        for source, name in ((model, "model"), (data, "wds")):
            shutil.copytree(source, self.storage.directory / name)
        self.hosts = Hosts(root / "hosts", *NAMES)
        for host in self.hosts:
            # Below /mnt, which is the host's own then.
            host.run("mount", "-t", "tmpfs", "tmpfs", "/mnt", check=True)
            host.run("mkdir", self.mount, check=True)
            host.start(self.storage.client(self.mount, STALE))
            storage.wait_until(lambda host=host: host.run("mountpoint", self.mount).code == 0)

    def start(self, save: str, *words: object, port: int = 29500) -> list:
        """The launchers of both nodes."""
        command = [
            sys.executable, "-m", "megatron_vl", "train", "--load", self.mount / "model",
            "--train-data-path", self.mount / "wds", "--save", self.mount / save,
            "--metrics-file", self.mount / f"{save}.jsonl", "--pipeline-model-parallel-size", 2,
            "--seq-length", 64, "--packing-buffer-size", 16, "--global-batch-size", 2,
            "--train-iters", STEPS, "--lr", 1e-3, "--eval-interval", 0, "--num-workers", 1, *words,
        ]
        return [
            host.start(command, NNODES=2, NODE_RANK=node, NPROC_PER_NODE=1,
                       MASTER_ADDR=self.hosts["one"].address, MASTER_PORT=port)
            for node, host in enumerate(self.hosts)
        ]

    def losses(self, save: str) -> dict[int, float]:
        file = self.storage.directory / f"{save}.jsonl"
        text = file.read_text() if file.exists() else ""
        records = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
        return {one["iteration"]: one["loss"] for one in records if one["kind"] == "train"}

    def wait_for_step(self, save: str, step: int, jobs: list) -> None:
        def there() -> bool:
            assert all(job.poll() is None for job in jobs), jobs[0].text
            return step in self.losses(save)
        storage.wait_until(there, 120)


def ended(jobs: list, *codes: int) -> None:
    for job, code in zip(jobs, codes, strict=True):
        assert job.wait(timeout=180) == code, jobs[0].text + jobs[1].text


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, text_model_dir, text_wds_dir):
    cluster = Cluster(tmp_path_factory.mktemp("storage"), text_model_dir, text_wds_dir)
    with cluster.hosts:
        yield cluster


@pytest.fixture(scope="module")
def calm(cluster) -> dict[int, float]:
    jobs = cluster.start("calm", "--save-interval", 1000)
    ended(jobs, 0, 0)
    losses = cluster.losses("calm")
    assert len(losses) == STEPS
    return losses


def test_a_slow_server_and_one_that_is_gone_for_a_while_cost_time_alone(cluster, calm):
    cluster.storage.tell(delay=0.005)
    jobs = cluster.start("slow", "--save-interval", 20)
    cluster.wait_for_step("slow", 5, jobs)
    cluster.storage.tell(down=True)
    with pytest.raises(AssertionError, match="not within"):
        storage.wait_until(lambda: STEPS in cluster.losses("slow"), AWAY)
    cluster.storage.tell()
    ended(jobs, 0, 0)
    assert cluster.losses("slow") == calm


def test_a_save_that_the_server_refuses_is_told_and_costs_no_step(cluster, calm):
    jobs = cluster.start("broken", "--save-interval", 40)
    cluster.wait_for_step("broken", 20, jobs)
    cluster.storage.tell(broken="fsync")
    cluster.wait_for_step("broken", 60, jobs)
    cluster.storage.tell()
    ended(jobs, 0, 0)
    assert "Input/output error" in jobs[0].text
    assert cluster.losses("broken") == calm


def test_ranks_wait_for_a_checkpoint_that_their_host_does_not_see_yet(cluster, calm):
    jobs = cluster.start("stale", "--save-interval", 10)
    cluster.wait_for_step("stale", 15, jobs)
    for host in cluster.hosts:
        for one in host.processes("megatron_vl"):
            one.kill()
    ended(jobs, -signal.SIGKILL, -signal.SIGKILL)
    latest = cluster.storage.directory / "stale" / "latest_checkpointed_iteration.txt"
    saved = int(latest.read_text())  # 10, or more where the kill came late
    jobs = cluster.start("stale", "--save-interval", 10)
    ended(jobs, 0, 0)
    assert "for the file system to show the same everywhere" in jobs[0].text
    assert f"resumed from /mnt/shared/stale/iter_{saved:07d}" in jobs[0].text
    assert cluster.losses("stale") == calm


def test_of_two_launches_into_one_save_one_runs_and_the_other_is_told_who_does(cluster):
    both = [cluster.start("same", "--train-iters", 10_000, port=port) for port in (29500, 29600)]
    storage.wait_until(lambda: any(jobs[0].poll() is not None for jobs in both), 180)
    refused, runs = sorted(both, key=lambda jobs: jobs[0].poll() is None)
    ended(refused, 2, 2)
    holder = (cluster.storage.directory / "same" / ".lock").read_text().strip()
    assert f"is being written by another run, process {holder}; end that one" in refused[0].text
    assert len([line for line in refused[0].text.splitlines() if "another run" in line]) == 1
    cluster.wait_for_step("same", 1, runs)
    for job in runs:
        job.signal(signal.SIGTERM)
    ended(runs, 0, 0)
    assert "saved /mnt/shared/same/iter_" in runs[0].text
