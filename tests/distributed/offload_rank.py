"""Megatron-Core's hybrid optimizer without a GPU: is it the same optimizer, and does it resume?

    python offload_rank.py HF_DIR DATASET SCRATCH

Every tensor is in host memory here. To that one module of Megatron-Core, and to no other, all are
said to be on a device, but those that it copies to the host itself. Prints a line a share.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

from megatron_vl.platform import initialize, select_platform

select_platform().install()

import torch  # noqa: E402
from megatron.core.optimizer import cpu_offloading, optimizer_config  # noqa: E402

from megatron_vl.parity.cases import CASES, make_batches, make_samples  # noqa: E402
from megatron_vl.training.checkpoint.resume import load_checkpoint  # noqa: E402
from megatron_vl.training.checkpoint.saver import Saver  # noqa: E402
from megatron_vl.training.checkpoint.state import save_checkpoint  # noqa: E402
from megatron_vl.training.checkpoint.weights import load_weights  # noqa: E402
from megatron_vl.training.options.config import TrainConfig  # noqa: E402
from megatron_vl.training.plan import plan_run  # noqa: E402
from megatron_vl.training.setup import build_model, build_optimizer  # noqa: E402
from megatron_vl.training.step import run_batches  # noqa: E402
from megatron_vl.weights.convert import inspect_weights  # noqa: E402
from megatron_vl.weights.mcore_io import inspect_checkpoint  # noqa: E402

STEPS = 4
SHARES = None, 0.0, 0.5, 1.0


class OnHost(torch.Tensor):
    """What the hybrid optimizer copied to the host, and what is computed from it."""


class Stream:
    """A CUDA stream or event: host work is in order."""

    def __getattr__(self, name):
        return lambda *args: self


def pretend() -> None:
    def asked_by_hybrid() -> bool:
        return sys._getframe(2).f_globals["__name__"] == cpu_offloading.hybrid_optimizer.__name__

    to, cpu = torch.Tensor.to, torch.Tensor.cpu

    def move(self, *args, **kwargs):
        if not asked_by_hybrid() or args[0] not in ("cpu", "cuda"):
            return to(self, *args, **kwargs)
        return self.as_subclass(OnHost if args[0] == "cpu" else torch.Tensor)

    torch.Tensor.is_cuda = property(
        lambda self: asked_by_hybrid() and not isinstance(self, OnHost))
    torch.Tensor.cpu = lambda self: (
        self.clone().as_subclass(OnHost) if asked_by_hybrid() else cpu(self))
    torch.Tensor.to = move
    torch.Tensor.pin_memory = lambda self: self
    torch.cuda.current_stream = lambda *args: Stream()
    optimizer_config.is_te_min_version = lambda *args, **kwargs: False  # none is installed


def train(plan, platform, batches, load: bool = False, save: bool = False):
    """The weights after STEPS steps, gradient norms of those run here, and the optimizer."""
    adapted = plan.trainable.adapter is not None
    model = build_model(plan, platform, initialize_weights=not (load or adapted))
    if adapted and not load:
        base = inspect_weights(plan.config.checkpoint.load)
        load_weights(base, model, plan.spec, plan.layout, plan.split)
    optimizer, scheduler = build_optimizer(plan, model, platform)
    done = 0
    if load:
        info = inspect_checkpoint(plan.config.checkpoint.save)
        done = load_checkpoint(plan, info, True, model, optimizer, scheduler).iteration
    norms = []
    for step in range(done + 1, STEPS + 1):
        for chunk in model:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        run_batches(model, batches, platform.device(0))
        norms.append(float(optimizer.step()[1]))
        scheduler.step(increment=1)
        if save and step == 2:
            saver = Saver(Path(plan.config.checkpoint.save))
            (saved,) = save_checkpoint(
                saver, plan, step, model, optimizer, scheduler, loader_state=None, guard={},
                samples=0,
            )
            assert not saved.error, saved
    return [parameter.detach().clone() for parameter in model[0].parameters()], norms, optimizer


def sizes(optimizer) -> tuple[int, int]:
    """Numbers that the host and that the device keeps state of."""
    (one,) = optimizer.chained_optimizers
    if not isinstance(one.optimizer, cpu_offloading.HybridDeviceOptimizer):
        return 0, sum(p.numel() for group in one.optimizer.param_groups for p in group["params"])
    groups = [o.param_groups for o in one.optimizer.cpu_optimizers], [
        o.param_groups for o in [one.optimizer.gpu_optimizer] if o]
    return tuple(sum(p.numel() for side in part for group in side for p in group["params"])
                 for part in groups)


def main() -> None:
    hf_dir, dataset, scratch = map(Path, sys.argv[1:])
    pretend()
    platform = SimpleNamespace(
        fuses_ops=False, in_host_memory=False, device=select_platform().device
    )
    results = {}
    for rank, share in (*((None, one) for one in SHARES), (3, None), (3, 0.5)):
        of = dict(hf_config=str(hf_dir)) if rank is None else dict(
            load=str(hf_dir), lora_rank=rank)
        plan = plan_run(TrainConfig.from_dict(of | dict(
            train_data_path=str(dataset), lr=1e-2, min_lr=1e-3, bf16=True,
            use_distributed_optimizer=True, seq_length=128, train_iters=STEPS,
            optimizer_cpu_offload=share is not None, optimizer_offload_fraction=share or 0.0,
            save=str(scratch / f"{rank} {share}"),
        )), 1)
        initialize(plan.layout)
        torch.manual_seed(1)
        batches = make_batches(plan.spec, CASES[0], make_samples(plan.spec, CASES[0]))
        weights, norms, optimizer = train(plan, platform, batches, save=True)
        results[rank, share] = weights, norms
        again, last_norms, _ = train(plan, platform, batches, load=True)
        assert results[rank, None][1] == norms, f"share {share}: norms {norms}"
        for what, one in (("without offload", results[rank, None][0]), ("uninterrupted", again)):
            assert all(map(torch.equal, one, weights)), f"share {share} differs from {what}"
        assert last_norms == norms[2:], f"share {share}: resumed norms {last_norms}, {norms}"
        host, device = sizes(optimizer)
        of = "the" if rank is None else "an adapter's"
        print(f"share {share}: {host / (host + device):.2f} of {of} state in host memory; equal")


if __name__ == "__main__":
    main()
