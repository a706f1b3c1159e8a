"""Short trainings one after another on the same ranks, each with what its ranks held written down.

    torchrun --nproc-per-node N training_jobs.py OUT     (or without torchrun, on one rank)

reads OUT/jobs.json, {name: options of megatron-vl train}, with `save` OUT/name, and trains on the
rows of a parity case, two of whose four microbatches have no image, or none of a text model's. Rank
R leaves OUT/name.R.json. With an option `resume` [other, iteration] the job goes on where OUT/other
was, with an option `slow` [rank, seconds] that rank sleeps in each of its forward passes, with
`vary` a microbatch's rows are no longer than it needs. With an `eval_interval` it validates as
often.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_vl.training.loop import Trainer

CASE = 3  # of parity.CASES; of a model that takes text alone, its first


def main(out: Path, watch: Callable[[Trainer], dict] = lambda _: {}) -> None:
    """`watch` is given each job's trainer before its first step; what it returns, and fills, goes
    into the job's file."""
    import torch

    from megatron_vl.platform import leave_layout

    jobs = json.loads((out / "jobs.json").read_text())
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for name, options in jobs.items():
        other, iteration = options.pop("resume", (None, 0))
        slow = options.pop("slow", (None, 0))
        vary = options.pop("vary", False)
        if other is not None and rank == 0:
            shutil.copytree(out / other, out / name)
            (out / name / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        found = run(options, world, watch, slow[1] if slow[0] == rank else 0, vary)
        (out / f"{name}.{rank}.json").write_text(json.dumps(found))
        leave_layout()


def run(
    options: dict, world: int, watch: Callable[[Trainer], dict], sleep: float = 0,
    vary: bool = False,
) -> dict:
    from megatron.core import parallel_state

    from megatron_vl.launch.stop import StopRequest
    from megatron_vl.parity.cases import CASES, cases, make_batches, make_samples
    from megatron_vl.platform import initialize
    from megatron_vl.training.loop import Trainer
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.plan import plan_run
    from megatron_vl.training.reporting.describe import describe
    from megatron_vl.training.resilience.hang import HangWatch
    from megatron_vl.training.step import RowStream

    plan = plan_run(TrainConfig.from_dict(options), world)
    platform = initialize(plan.layout, embedding_stage=plan.split.embedding_chunk[0])
    trainer = Trainer(plan, platform, StopRequest(), HangWatch(0, Path(), print))
    trainer.restore()
    graphs = []  # whether the vision layers' outputs had one
    for chunk in trainer.model:
        if sleep:
            chunk.module.register_forward_pre_hook(lambda *_: time.sleep(sleep))
        if chunk.module.vision_model is not None:
            chunk.module.vision_model.decoder.register_forward_hook(
                lambda _, __, output: graphs.append(
                    (output[0] if isinstance(output, tuple) else output).requires_grad)
            )
    case = CASES[CASE] if plan.spec.vision is not None else cases(plan.spec, True)[0]
    dp_rank = parallel_state.get_data_parallel_rank()
    watched, rates = watch(trainer), []
    for step in range(trainer.done + 1, plan.config.batch.train_iters + 1):
        batches = make_batches(plan.spec, case, make_samples(plan.spec, case),
                               parts=plan.layout.row_parts, vary=vary)
        # A data rank has images in one step and none in the next.
        batches = (batches[step:] + batches[:step])[dp_rank :: plan.layout.dp]
        trainer.streams = [RowStream(iter(batches), trainer.device) for _ in trainer.model]
        rates.append({g["max_lr"]: g["lr"] for g in trainer.optimizer.param_groups})
        trainer.step(step)
        if not step % plan.config.checkpoint.save_interval:
            trainer.save()
        evals = plan.config.data.eval_interval
        if evals and not step % evals:
            trainer.poll_saves(wait=True)
            trainer.evaluate(step)
    held = what_is_held(trainer)
    trainer.close()
    return {"said": describe(plan, platform), "rates": rates, "vision graph": any(graphs), **held,
            "imported": sorted({name.partition(".")[0] for name in sys.modules}), **watched}


def what_is_held(trainer) -> dict:
    """Numbers of parameters on this rank: trained, in gradient buffers, with optimizer state."""
    weights = [weight for chunk in trainer.model for weight in chunk.parameters()]
    frozen = [weight for weight in weights if not weight.requires_grad]
    state = dict(trainer.optimizer.state.items())
    return {
        "trained": sum(weight.numel() for weight in weights if weight.requires_grad),
        "buffers": sum(b.numel_unpadded for b in buffers_of(trainer)),
        # What tensor-parallel ranks hold of an adapter alike, each factor by its sum.
        "alike": [float(weight.double().sum().cpu()) for chunk in trainer.model
                  for name, weight in chunk.named_parameters()
                  if ".lora." in name and not getattr(weight, "tensor_model_parallel", False)],
        "frozen with a gradient": sum(
            hasattr(weight, "main_grad") or weight.grad is not None for weight in frozen
        ),
        "moments": sum(one["exp_avg"].numel() for one in state.values() if one),
        "bytes": held_bytes(trainer),
    }


def buffers_of(trainer) -> list:
    """The gradient buffers, those of divided experts too."""
    return [buffer for chunk in trainer.model
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def held_bytes(trainer) -> dict[str, int]:
    """Bytes of the storages that stay between steps, each counted once."""
    import torch

    from megatron_vl.ops.quantized import stored

    weights = [part for chunk in trainer.model for weight in chunk.parameters()
               for part in stored(weight)]
    buffers = buffers_of(trainer)
    optimizers = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    states = [one for each in optimizers for one in each.optimizer.state.values()]
    # Adam counts its steps in a scalar a weight.
    moments = [tensor for one in states for tensor in one.values()
               if isinstance(tensor, torch.Tensor) and tensor.dim()]
    updated = [weight for each in optimizers for group in each.optimizer.param_groups
               for weight in group["params"]]

    def count(tensors, known=()) -> int:
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
        return sum(storage.nbytes() for at, storage in storages.items() if at not in known)

    # In fp32 what the optimizer updates are the weights themselves.
    places = {weight.untyped_storage().data_ptr() for weight in weights}
    return {
        "weights": count(weights),
        "gradients": count(buffer.grad_data for buffer in buffers),
        "optimizer": count([*moments, *updated], places),
    }


if __name__ == "__main__":
    from megatron_vl.launch.worker import run_worker

    run_worker(lambda: main(Path(sys.argv[1])), command="jobs", debug=True)
