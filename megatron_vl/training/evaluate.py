"""Validation: loss and accuracy over the validation split, or over its first batches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import torch

from megatron_vl.data.encode.samples import Skipped
from megatron_vl.training.answers import answer_of
from megatron_vl.training.microbatches import Microbatches, valid_loader
from megatron_vl.training.reporting.validation import Figures, Validation
from megatron_vl.training.scores import Tally, shown_samples, sum_of, tally_up
from megatron_vl.training.step import blank_like, mean_loss


def evaluate(
    microbatches: Microbatches, iteration: int, *, stopping: Callable[[], bool],
    tell: Callable[[list[Skipped]], None],
) -> Validation | None:
    """Validate on the validation split, or its first `eval_iters` batches; all ranks call it.

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
    scores = [one["samples"] for one in losses]
    tallies, shown = tally_up(scores, microbatches.device), shown_samples(scores)
    per_sample = plan.config.batch.calculate_per_sample_loss
    datasets = {name: _figures(one, per_sample=per_sample) for name, one in tallies.items()}
    total = _figures(sum_of(tallies.values()), per_sample=per_sample)
    torch.distributed.all_reduce(cut)
    samples_cut, tokens_cut = cut.tolist()
    return Validation(
        figures=replace(total, loss=loss), datasets=datasets if len(datasets) > 1 else {},
        answers=[answer_of(one, loader.chat) for one in shown],
        trained=trained, seconds=time.perf_counter() - started, skipped=dict(skipped),
        cut=(samples_cut, tokens_cut),
    )


def _figures(of: Tally, *, per_sample: bool) -> Figures:
    """`per_sample`: whether every sample has the same weight in the loss, and not every token."""
    samples, tokens = max(1, of.samples), max(1, of.trained)
    return Figures(
        loss=of.loss / (samples if per_sample else tokens), token_accuracy=of.right / tokens,
        exact_accuracy=of.exact / max(1, of.answered), samples=of.samples,
    )
