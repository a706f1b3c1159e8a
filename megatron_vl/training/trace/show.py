"""Traced beside predicted bytes, as text."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.training.plan import Plan
from megatron_vl.training.stage_memory import stage_memory
from megatron_vl.training.trace.rank import trace

GIB = 2**30


def telling_ranks(plan: Plan) -> list[int]:
    """The first rank of the first, a middle and the last stage, and of the fullest one."""
    pp = plan.layout.pp
    fullest = max(range(pp), key=lambda stage: stage_memory(plan, stage).bytes)
    per_stage = plan.layout.world_size // pp
    return [stage * per_stage for stage in sorted({0, pp // 2, pp - 1, fullest})]


def trace_rows(plan: Plan, ranks: Sequence[int] = ()) -> list[tuple[str, ...]]:
    """A table below its header: GiB of these ranks by kind; of none, of `telling_ranks`.

    Raises:
        InputError: see `trace`.
    """
    rows = [("traced, GiB", "stage", "weights", "gradients", "optimizer", "activations",
             "together", "predicted", "ratio", "seconds")]
    for one in trace(plan, ranks or telling_ranks(plan)):
        predicted = stage_memory(plan, one.stage).bytes
        numbers = (one.weight_bytes, one.gradient_bytes, one.optimizer_bytes, one.activation_bytes,
                   one.bytes, predicted)
        rows.append((f"rank {one.rank}", f"{one.stage}",
                     *(f"{number / GIB:.2f}" for number in numbers),
                     f"{predicted / one.bytes:.2f}", f"{one.seconds:.1f}"))
    return rows
