"""The ranks of a replay: the steps from the checkpoint on, and a close look at the last one."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_vl.data.encode.samples import RowBatch
from megatron_vl.data.load.row_loader import RowLoader
from megatron_vl.errors import InputError
from megatron_vl.platform import be_deterministic, connect, initialize
from megatron_vl.training.checkpoint.resume import (
    check_files,
    load_checkpoint,
    read_loader_state,
)
from megatron_vl.training.microbatches import Microbatches, train_loader, train_loader_of
from megatron_vl.training.replay.probe import Found, NotFinite, Probe, squared_gradients
from megatron_vl.training.replay.replayed import Replayed, Row, Sample
from megatron_vl.training.replay.report import lines, write_page
from megatron_vl.training.replay.source import Replay
from megatron_vl.training.reporting.experts import ExpertLoads
from megatron_vl.training.resilience.guard import StepGuard, update
from megatron_vl.training.resilience.hang import HangWatch
from megatron_vl.training.setup import build_model, build_optimizer
from megatron_vl.training.step import mean_loss


def run_replay(replay: Replay, page: Path) -> None:
    """Replay on this rank; rank 0 prints the report and writes it as a page too. All ranks call it.

    Raises:
        InputError: the checkpoint is damaged, or the data are no longer those of the run.
    """
    plan, config = replay.plan, replay.plan.config
    if config.model.deterministic:
        be_deterministic()
    connect(timeout_minutes=config.parallel.distributed_timeout_minutes)
    platform = initialize(
        plan.layout, embedding_stage=plan.split.embedding_chunk[0], seed=config.model.seed,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
    )
    if fault := check_files(replay.checkpoint.path):
        raise InputError(f"{replay.checkpoint.path} is damaged: {fault}; restore it, or remove it "
                         f"to replay from the checkpoint before.")
    model = build_model(plan, platform, initialize_weights=False)
    optimizer, scheduler = build_optimizer(plan, model, platform)
    watch = HangWatch(0, Path(), print)  # a person waits for it
    microbatches = Microbatches(plan, model, watch, timed=contextlib.nullcontext)
    loads = ExpertLoads(plan, model, microbatches.device)
    resumed = load_checkpoint(plan, replay.checkpoint, True, model, optimizer, scheduler)
    guard = StepGuard(max_skipped=config.fault.max_skipped_steps,
                      spike=config.fault.skip_grad_spikes)
    guard.restore(resumed.guard)
    optimizer.zero_grad()

    def say(text: str) -> None:
        if torch.distributed.get_rank() == 0:
            print(text, flush=True)

    say(f"loaded {replay.checkpoint.path}; steps to repeat before step {replay.step}: "
        f"{replay.step - resumed.iteration - 1}")
    if replay.note:
        say(f"NOT THE RUN'S: {replay.note}")
    loaders = _loaders(replay) if microbatches.exchange.is_reader else []
    if loaders:
        states = list(map(read_loader_state, resumed.loader_states))
        for told in dict.fromkeys(loader.restore_state(states) for loader in loaders):
            if told:
                say(f"NOT CHECKED: {told}")
    each = plan.num_microbatches // replay.sources
    streams = microbatches.streams(_in_turn(loaders, each) if loaders else None)
    first = plan.layout.coordinates(torch.distributed.get_rank()).dp * replay.sources

    def wanted(number: int) -> bool:
        return replay.replica in (None, first + number // each)

    for step in range(resumed.iteration + 1, replay.step + 1):
        last = step == replay.step
        probe = Probe(model, wanted)
        with probe.watching() if last else contextlib.nullcontext():
            losses = microbatches.backward(streams, optimizer)
        loss, _ = mean_loss(losses, microbatches.device)
        squares = squared_gradients(model, optimizer) if last else {}
        updated, norm, fault = update(optimizer, loss, guard)
        if updated:
            scheduler.step(increment=1)
        counts, *_ = [stream.take_counts() for stream in streams]
        loads.take()
        if not last:
            bad = f"; not updated: {fault}" if fault else ""
            say(f"step {step}/{replay.step}: loss {loss:.6f}{bad}")
    names = {number: (first + number // each, number % each, keys)
             for number, keys in enumerate(counts.sample_keys) if wanted(number)}
    sums = {number: one["sums"][:2].tolist() for number, one in enumerate(losses)}
    found = Replayed(
        loss=loss, grad_norm=norm, fault=fault, **_gathered(probe.found, squares, names, sums),
        left_out=tuple(dict.fromkeys(chain.from_iterable(_everyone(
            [f"{one.sample}: {one.message}" for one in counts.skipped])))),
    )
    text = lines(replay, found)
    say("\n".join(text))
    if torch.distributed.get_rank() == 0:
        write_page(page, replay, found, text)
    say(f"page: {page}")
    for loader in loaders:
        loader.close()


def _loaders(replay: Replay) -> list[RowLoader]:
    """Of the run's data-parallel ranks whose rows this replica reads, in their order."""
    plan = replay.plan
    if replay.sources == 1:
        return [train_loader(plan)]
    at = plan.layout.coordinates(int(os.environ["RANK"])).dp * replay.sources
    return [train_loader_of(plan, at + number, replay.layout.dp)
            for number in range(replay.sources)]


def _in_turn(loaders: Sequence[RowLoader], each: int) -> Iterator[RowBatch]:
    """Of every loader `each` microbatches, step after step."""
    batches = list(map(iter, loaders))
    while True:
        for one in batches:
            yield from islice(one, each)


def _gathered(
    found: Found, squares: dict[str, float], names: dict[int, tuple],
    sums: dict[int, list[float]],
) -> dict:
    """Members of `Replayed`, of all ranks together.

    Args:
        names: of each microbatch, where it stands in the run, and its samples' names.
        sums: of each microbatch, the loss summed over this rank's tokens, and its divisor.
    """
    speaks = parallel_state.get_tensor_model_parallel_rank() == 0  # for those that know the same
    mine = {
        "losses": {names[number][:2]: (names[number][2], one, sums[number])
                   for number, one in found.losses.items()} if speaks else {},
        "not finite": [(one, names[one.microbatch][:2]) for one in found.not_finite],
    }
    everyone = _everyone((mine, found.largest, squares))
    parts: dict[tuple[int, int], list[tuple]] = {}  # of a row, by context-parallel ranks
    for ours, _, _ in everyone:
        for place, part in ours["losses"].items():
            parts.setdefault(place, []).append(part)
    layers: dict[str, float] = {}
    largest: dict[str, float] = {}
    for _, outputs, gradients in everyone:
        for name, square in gradients.items():
            layers[name] = layers.get(name, 0.0) + square
        for name, value in outputs.items():
            largest[name] = max(value, largest.get(name, 0.0))
    bad: list[tuple[NotFinite, tuple[int, int]]] = list(
        chain.from_iterable(ours["not finite"] for ours, _, _ in everyone))
    return {
        "rows": [_row(place, of) for place, of in sorted(parts.items())],
        "layers": {name: math.sqrt(square) for name, square in layers.items()},
        "largest": largest,
        "not_finite": min(bad, default=None),
    }


def _row(place: tuple[int, int], parts: Sequence[tuple]) -> Row:
    """A row of what context-parallel ranks have of it."""
    (names, *_), losses, sums = zip(*parts, strict=True)
    total, divisor = map(sum, zip(*sums, strict=True))
    means = map(sum, zip(*losses, strict=True))
    return Row(
        replica=place[0], number=place[1], loss=total / divisor,
        samples=[Sample(name=name, loss=mean) for name, mean in zip(names, means, strict=True)],
    )


def _everyone(mine: object) -> list:
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
