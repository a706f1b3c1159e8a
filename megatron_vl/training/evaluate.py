"""Validation: the mean loss over the validation split, or over its first batches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch

from megatron_vl.data.encode.samples import Skipped
from megatron_vl.training.microbatches import Microbatches, valid_loader
from megatron_vl.training.step import blank_like, mean_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What a validation found, alike on every rank but for `skipped`."""

    loss: float
    trained: int  # tokens that the loss is the mean over
    seconds: float
    # By reason. A reader reads the integers of the whole split, but only its own rows' pixels.
    skipped: dict[str, int]
    cut: tuple[int, int]  # long samples that were truncated, and tokens of them, over all ranks


def evaluate(
    microbatches: Microbatches, iteration: int, *, stopping: Callable[[], bool],
    tell: Callable[[list[Skipped]], None],
) -> Validation | None:
    """Mean loss over the validation split, or its first `eval_iters` batches; all ranks call it.

    Args:
        stopping: whether any rank was asked to stop; all ranks ask together.
        tell: is given the samples that a reader leaves out.

    Returns:
        None where it was given up, as a rank was asked to stop.
    """
    started = time.perf_counter()
    plan, exchange = microbatches.plan, microbatches.exchange
    for chunk in microbatches.model:
        chunk.eval()
    reads, batches = exchange.is_reader, iter(())
    if reads:
        loader = valid_loader(plan)
        batches = iter(loader)
    losses, skipped, stopped = [], Counter(), False
    cut = torch.zeros(2, dtype=torch.int64, device=microbatches.device)
    while True:
        microbatches.watch.beat(f"validating after iteration {iteration}")
        stopped = stopping()
        if stopped:
            break
        # The loader knows where the split ends; the replica's other ranks are told.
        group = list(islice(batches, plan.num_microbatches))
        if group and plan.layout.vp > 1:
            # The interleaved schedule takes whole rounds of the stages; padding trains nothing.
            group += [blank_like(group[0])] * (-len(group) % plan.layout.pp)
        size = exchange.number(len(group))
        if size == 0:
            break
        streams = microbatches.streams(iter(group) if reads else None)
        losses += microbatches.run(streams, size, forward_only=True)
        if reads:
            counts = streams[0].take_counts()
            skipped.update(one.reason for one in counts.skipped)
            tell(counts.skipped)
            cut += torch.tensor([counts.samples_cut, counts.tokens_cut], device=cut.device)
    if reads:
        loader.close()
    if stopped:
        return None
    loss, trained = mean_loss(losses, microbatches.device)
    torch.distributed.all_reduce(cut)
    samples_cut, tokens_cut = cut.tolist()
    return Validation(
        loss=loss, trained=trained, seconds=time.perf_counter() - started, skipped=dict(skipped),
        cut=(samples_cut, tokens_cut),
    )
