"""Trainings over several hosts, started by `megatron-vl launch`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from commands import ROOT
from hosts import Host, Job

# What a test process has and a host's login has not.
ENVIRONMENT = ("--env", "PYTHONPATH", "--env", "OMP_NUM_THREADS")


def launch(host: Host, names: Sequence[str], *command: object, options: Sequence[object] = (),
           cwd: Path = ROOT) -> Job:
    """`megatron-vl launch` on `host`, of a command on the hosts of these names."""
    hostfile = host.hosts.root / "hostfile"
    hostfile.write_text("".join(f"{name}\n" for name in names))
    return host.start([sys.executable, "-m", "megatron_vl", "launch", "--hostfile", hostfile,
                       *options, "--", *command], cwd=cwd)


class Training:
    """One command, given again and again: a pipeline over two hosts that saves every 5 steps."""

    def __init__(self, workshop, root: Path, **options: object):
        self.save, self.metrics = root / "save", root / "metrics.jsonl"
        self.options = {
            "load": workshop.weights(1, 2), "train_data_path": workshop.wds_dir,
            "pipeline_model_parallel_size": 2, "nproc_per_node": 1, "seq_length": 256,
            "packing_buffer_size": 16, "global_batch_size": 4, "train_iters": 20, "lr": "1e-3",
            "lr_decay_style": "constant", "lr_decay_iters": 10_000, "eval_interval": 0,
            "num_workers": 0, "save": self.save, "save_interval": 5, "save_total_limit": 3,
            "metrics_file": self.metrics, **options,
        }

    def words(self, **changes: object) -> list[object]:
        pairs = [(f"--{name.replace('_', '-')}", value)
                 for name, value in {**self.options, **changes}.items()]
        return ["train", "--use-distributed-optimizer", "--no-report",
                *(word for pair in pairs for word in pair)]

    def start(self, host: Host, names: Sequence[str], *, port: int = 29500,
              **changes: object) -> Job:
        return launch(host, names, *self.words(**changes),
                      options=(*ENVIRONMENT, "--master-port", port))

    @property
    def losses(self) -> dict[int, float]:
        """Of every step, as it was done last."""
        text = self.metrics.read_text() if self.metrics.exists() else ""
        records = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
        return {one["iteration"]: one["loss"] for one in records if one["kind"] == "train"}

    def wait_for_step(self, number: int, job: Job, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while number not in self.losses:
            assert time.monotonic() < deadline and job.poll() is None, job.text
            time.sleep(0.05)
