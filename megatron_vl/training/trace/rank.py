"""One rank of any layout, built as itself in a process of its own, through one step's microbatches.

Model, data-parallel wrapper, optimizer and schedule are those of a run; the device has no memory
and the other ranks are not there: see `platform.meta`. So bytes are read, not computed.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from megatron_vl.errors import InputError
from megatron_vl.ops.experts import OFF, ON, ExpertsCase
from megatron_vl.training.plan import Plan

if TYPE_CHECKING:
    import torch

    from megatron_vl.platform import Platform


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTrace:
    """Bytes of one rank, each storage counted once."""

    rank: int
    stage: int
    weight_bytes: int
    gradient_bytes: int  # of Megatron-Core's buffers
    optimizer_bytes: int  # moments, and weights in fp32
    activation_bytes: int  # the most of all else, until the last backward is over
    seconds: float

    @property
    def bytes(self) -> int:
        return (self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
                + self.activation_bytes)


def trace(plan: Plan, ranks: Sequence[int]) -> list[RankTrace]:
    """What these ranks of `plan` take, one after the other in a process that ends with this call.

    Attention and layers are those of a CPU, in plain torch, whatever the options name.

    Raises:
        InputError: a rank that is not there, or what cannot be traced, by name.
    """
    check_trace(plan, ranks)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(partial(trace_rank, plan), ranks))


def check_trace(plan: Plan, ranks: Iterable[int]) -> None:
    """Raises InputError as `trace` does."""
    config, world = plan.config, plan.layout.world_size
    for rank in ranks:
        if not 0 <= rank < world:
            raise InputError(
                f"--trace has rank {rank}, but this run has ranks 0 to {world - 1}; leave it out."
            )
    for named, why in (
        (config.model.fp8_format is not None and "fp8-format", "needs TransformerEngine's layers"),
        (config.model.cpu_offloading and "cpu-offloading", "needs TransformerEngine's layers"),
        (config.tp_overlap.tp_comm_overlap and "tp-comm-overlap",
         "needs TransformerEngine's layers"),
        (bool(config.offload.offload_modules) and "offload-modules",
         "moves what a rank holds to the host"),
        (config.optimizer.optimizer_cpu_offload and "optimizer-cpu-offload",
         "moves what a rank holds to the host"),
    ):
        if named:
            raise InputError(
                f"--trace cannot follow this run: {named} {why}; leave --trace out, the predicted "
                f"bytes stand without it."
            )


def trace_rank(plan: Plan, rank: int) -> RankTrace:
    """The same of one, in this process, whose only platform is to be the meta device."""
    from megatron_vl.platform import initialize
    from megatron_vl.platform.meta import become

    warnings.simplefilter("ignore")  # of names that later versions of torch give collectives
    model_run = replace(plan.config.model, attention_backend="auto")
    plan = experts_as_predicted(replace(plan, config=replace(plan.config, model=model_run)))
    become(rank, plan.layout.world_size)
    return measure(plan, rank, initialize(
        plan.layout, embedding_stage=plan.split.embedding_chunk[0]))


def experts_as_predicted(plan: Plan) -> Plan:
    """The same run, whose experts are computed as the formulas take them, which may be a GPU's way.
    """
    way, config = plan.experts_way(ExpertsCase), plan.config
    if way is None:
        return plan
    experts = replace(config.experts, moe_grouped_gemm=ON if way.grouped else OFF)
    return replace(plan, config=replace(config, experts=experts))


def measure(plan: Plan, rank: int, platform: Platform) -> RankTrace:
    """Bytes of this process, which is `rank`, in the microbatches that fill its pipeline."""
    from megatron_vl.training.setup import build_model, build_optimizer
    from megatron_vl.training.trace.allocated import AllocatedBytes

    started = time.perf_counter()
    model = build_model(plan, platform, initialize_weights=False)
    optimizer, _ = build_optimizer(plan, model, platform)
    kinds = held(model, optimizer)
    for chunk in model:
        chunk.config.finalize_model_grads_func = partial(
            _undivided, chunk.config.finalize_model_grads_func)
    device = platform.device(0)
    known = [one for kind in kinds.values() for one in kind]
    resized = "selective" in (plan.recompute.granularity, plan.vit_recompute.granularity)
    with AllocatedBytes(known, device.type, resized=resized) as counted:
        _run_microbatches(plan, model, device)
    sizes, seen = {}, set()
    for kind, tensors in kinds.items():
        storages = {one.untyped_storage()._cdata: one.untyped_storage() for one in tensors}
        sizes[f"{kind}_bytes"] = sum(
            one.nbytes() for key, one in storages.items() if key not in seen)
        seen |= storages.keys()
    return RankTrace(
        rank=rank, stage=plan.layout.coordinates(rank).pp, activation_bytes=counted.peak,
        seconds=time.perf_counter() - started, **sizes,
    )


def held(model: list, optimizer=None) -> dict[str, list[torch.Tensor]]:
    """The tensors that stay from step to step, by kind; some may share a storage.

    Args:
        model: this rank's chunks, wrapped for data parallelism.
        optimizer: Megatron-Core's; None: there is none to count.
    """
    from megatron_vl.ops.quantized import QuantizedTensor

    weights = [one for chunk in model for weight in chunk.module.parameters() for one in (
        (weight.codes, weight.scales) if isinstance(weight, QuantizedTensor) else (weight,))]
    buffers = [one for chunk in model for one in chunk.module.buffers()]
    gradients = [buffer.grad_data for chunk in model
                 for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    state = []
    for one in getattr(optimizer, "chained_optimizers", [optimizer] if optimizer else []):
        if getattr(one, "is_stub_optimizer", False):  # of a rank that trains nothing
            continue
        state += [weight for group in one.optimizer.param_groups for weight in group["params"]]
        state += [value for values in one.optimizer.state.values() for value in values.values()]
    return {"weight": [*weights, *buffers], "gradient": gradients, "optimizer": state}


def _run_microbatches(plan: Plan, model: list, device: torch.device) -> None:
    """As many microbatches of full rows as fill the pipeline, through its schedule."""
    from megatron_vl.training.step import run_schedule, streams_of
    from megatron_vl.training.trace.row import full_batch

    layout = plan.layout
    # One more than are kept at once; with virtual stages until what came last in the warm-up, which
    # Megatron-Core holds on to, has its gradient too.
    number = min(plan.num_microbatches, layout.pp + 1 if layout.vp == 1 else 3 * layout.pp)

    def rows(chunk) -> Iterator:
        while True:  # pixels are gone when their forward is over, as from a loader
            yield full_batch(plan, device if chunk.module.pre_process else None)

    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    run_schedule(
        model, streams_of(model, [*map(rows, model)], device), num_microbatches=number,
        micro_batch_size=plan.config.batch.micro_batch_size, row_length=plan.row_length,
        forward_only=False,
    )


def _undivided(finalize, model: list, num_tokens=None, **more) -> None:
    """The end of a step without the number of its tokens, which the device cannot tell."""
    finalize(model, None, **more)
