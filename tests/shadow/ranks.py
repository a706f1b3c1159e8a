"""Ranks of a job on the shadow device, or of the one that it is compared with.

    torchrun --nproc-per-node N ranks.py OUT npu|cpu

runs the jobs of OUT/jobs.json as distributed/training_jobs.py does. On NPUs it says of each how
often the host waited for the device, by the line it did so: in the schedule of the last step, over
all its microbatches; in the rest of that step; and in the latest microbatches of a validation.
`unasked` are the trained weights whose module did not run before they were used, so that one that
is still being gathered would not have been waited for. `offloaded` are the modules whose tensors go
to the host, and the bytes that do in the last step. The CPU sums a gradient's squares in fp32 here,
as NPUs do.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
OUT, KIND = Path(sys.argv[1]), sys.argv[2]
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]
if KIND == "npu":
    sys.path.insert(0, str(TESTS / "shadow" / "site"))  # which installs torch_npu
    os.environ["LOCAL_RANK"] = "0"  # each rank sees but its own NPU


def watch(trainer) -> dict:
    """The latest waits, as long as the trainer goes on."""
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
        ChunkOffloadHandler,
        PipelineOffloadManager,
    )

    waits = {"schedule": {}, "step": {}, "validation": {}}
    found = {"waits": waits, "unasked": unasked(trainer.model), "offloaded": {}}
    run, step = trainer.microbatches.run, trainer.step
    moved, offload = [], ChunkOffloadHandler.offload

    def counted_run(streams, num_microbatches, forward_only):
        before = +device.waits
        out = run(streams, num_microbatches, forward_only)
        waits["validation" if forward_only else "schedule"] = device.waits - before
        return out

    def counted_step(iteration: int) -> None:
        before = +device.waits
        moved.clear()
        step(iteration)
        waits["step"] = device.waits - before - waits["schedule"]
        manager = PipelineOffloadManager.OFFLOAD_MGR
        if manager is not None:
            found["offloaded"] = {"modules": list(manager.offload_summary_bytes),
                                  "bytes": sum(moved)}

    def counted_offload(self, tensor, *args, **kwargs):
        moved.append(tensor.nbytes)
        return offload(self, tensor, *args, **kwargs)

    ChunkOffloadHandler.offload = counted_offload
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


def work() -> None:
    import training_jobs

    if KIND == "npu":
        training_jobs.main(OUT, watch)
        return
    import torch

    from megatron_vl.platform.optimizer import install_optimizer

    install_optimizer(norm_dtype=torch.float32)
    training_jobs.main(OUT)


if __name__ == "__main__":
    from megatron_vl.launch.worker import run_worker

    if KIND == "npu":
        import torch  # noqa: F401  which loads torch_npu

        from shadow import device
    run_worker(work, command="jobs", debug=True)
