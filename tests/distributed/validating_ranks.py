"""Whole runs one after another on the same ranks, of whose validations tests read the files.

    torchrun --nproc-per-node N validating_ranks.py OUT

reads OUT/jobs.json, a list of options of megatron-vl train. With `killed` [save, iteration]
the run's `save` is first made what another was when it had saved that iteration and not yet
recorded its validation.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path


def main(out: Path) -> None:
    import torch

    from megatron_vl.launch.stop import StopRequest
    from megatron_vl.platform import leave_layout
    from megatron_vl.training.loop import train
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.plan import plan_run

    for options in json.loads((out / "jobs.json").read_text()):
        killed = options.pop("killed", None)
        if killed is not None and torch.distributed.get_rank() == 0:
            as_killed(Path(killed[0]), killed[1], Path(options["save"]))
        torch.distributed.barrier()
        plan = plan_run(TrainConfig.from_dict(options), torch.distributed.get_world_size())
        train(plan, stop=StopRequest(), give_up=print)
        leave_layout()


def as_killed(source: Path, iteration: int, save: Path) -> None:
    shutil.copytree(source, save)
    for later in save.glob("iter_*"):
        if int(later.name.removeprefix("iter_")) > iteration:
            shutil.rmtree(later)
    (save / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    (save / "metrics.jsonl").unlink()
    record = json.loads((save / "best_checkpoint.json").read_text())
    record["validations"] = [
        one for one in record["validations"] if one["iteration"] < iteration
    ]
    record["checkpoint"] = None if record["checkpoint"] >= iteration else record["checkpoint"]
    (save / "best_checkpoint.json").write_text(json.dumps(record))


def start(out: Path) -> None:
    from megatron_vl.platform import connect

    connect(timeout_minutes=5)
    main(out)


if __name__ == "__main__":
    from megatron_vl.launch.worker import run_worker

    run_worker(lambda: start(Path(sys.argv[1])), command="jobs", debug=True)
