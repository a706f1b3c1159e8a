"""Ranks of a job on the shadow device.

    torchrun --nproc-per-node N ranks.py OUT

runs the jobs of OUT/jobs.json as distributed/training_jobs.py does, and says of each how often the
host waited for the device, by the line it did so: in the schedule of the last step, over all its
microbatches; in the rest of that step; and in the latest microbatches of a validation. `unasked`
are the trained weights whose module did not run before they were used, so that one that is still
being gathered would not have been waited for. `offloaded` are the bytes that a step moved to the
host, by the module that saved them.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]


def watch(trainer) -> dict:
    """The latest waits, as long as the trainer goes on."""
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
        PipelineOffloadManager,
    )

    waits = {"schedule": {}, "step": {}, "validation": {}}
    found = {"waits": waits, "unasked": unasked(trainer.model), "offloaded": {}}
    run, step = trainer.microbatches.run, trainer.step

    def counted_run(streams, num_microbatches, forward_only):
        before = +device.waits
        out = run(streams, num_microbatches, forward_only)
        waits["validation" if forward_only else "schedule"] = device.waits - before
        return out

    def counted_step(iteration: int) -> None:
        before = +device.waits
        step(iteration)
        waits["step"] = device.waits - before - waits["schedule"]
        manager = PipelineOffloadManager.OFFLOAD_MGR
        found["offloaded"] = {} if manager is None else manager.offload_summary_bytes

    trainer.microbatches.run, trainer.step = counted_run, counted_step
    return found


def unasked(chunks: list) -> list[str]:
    """All trained weights; each leaves the list when its module's hooks run."""
    names = []

    def asked(module, _, *, own: list[str]) -> None:
        names[:] = [name for name in names if name not in own]

    for number, chunk in enumerate(chunks):
        for prefix, module in chunk.module.named_modules():
            own = [f"{number}.{prefix}.{name}" for name, weight in
                   module.named_parameters(recurse=False) if weight.requires_grad]
            names += own
            module.register_forward_pre_hook(partial(asked, own=own))
    return names


if __name__ == "__main__":
    import training_jobs

    from megatron_vl.launch.worker import run_worker
    from shadow import device
    from shadow.machine import use_it

    use_it()
    run_worker(lambda: training_jobs.main(Path(sys.argv[1]), watch), command="jobs", debug=True)
