"""The first thing that would make a run faster, computed from the run's own first steps.

Whatever is named was tried: the run's checks accept it, and where the card is known it fits. What
a resumed run may not change, as what its data's position depends on, is for a new one. Times
of other splits come from the measured seconds of a language layer and of what else each stage
computes, run through the pipeline's simulation.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_vl.errors import InputError
from megatron_vl.parallel import LANGUAGE, VISION
from megatron_vl.planner.balance import Rows, balanced
from megatron_vl.planner.cards import Card
from megatron_vl.planner.commands import flags
from megatron_vl.planner.schedule import Pipeline, simulate
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.plan import Plan, plan_run
from megatron_vl.training.reporting.first_steps import GIB, Measured
from megatron_vl.training.stage_memory import StageMemory, stage_memory

LEAST = 0.05  # of a step's time that must be saved
Predict = Callable[[Plan, Sequence[StageMemory]], float]  # seconds of a step


@dataclass(frozen=True, kw_only=True, slots=True)
class Hint:
    """What would help, and the share of a step's time that it saves."""

    gain: float
    text: str  # a sentence


def advice(
    plan: Plan, measured: Measured, stages: Sequence[StageMemory], *, card: Card | None,
    per_node: int, predict: Predict,
) -> str:
    """The sentence that saves most; empty where none saves LEAST.

    Args:
        stages: what was predicted of each.
        predict: of another plan on this card; asked where there is one.
    """
    room = _Room(measured, stages, card)
    found = [*_reading(plan, measured, per_node), *_stages(plan, measured, room),
             *_memory(plan, measured, room, stages, predict)]
    # Another batch trains another way: it is named where nothing else helps.
    for hints in (found, _more_rows(plan, measured)):
        worth = [one for one in hints if one.gain >= LEAST]
        if worth:
            return max(worth, key=lambda one: one.gain).text
    return ""


def _tried(plan: Plan, **options: object) -> Plan | None:
    """The run with other options; None if its checks refuse them."""
    try:
        config = TrainConfig.from_dict(plan.config.to_dict() | options)
        return plan_run(config, plan.layout.world_size, here=False)
    except InputError:
        return None


class _Room:
    """Whether other plans fit the card, by what was measured of this one."""

    def __init__(self, measured: Measured, stages: Sequence[StageMemory], card: Card | None):
        self.bytes = None if card is None or measured.memory_bytes is None else card.room
        more = [] if self.bytes is None else [
            held - one.bytes for held, one in zip(measured.memory_bytes, stages, strict=True)]
        self.beyond = max(0, *more) if more else 0  # what this run took beyond its prediction

    def fits(self, stages: Sequence[StageMemory]) -> bool:
        return self.bytes is None or max(one.bytes for one in stages) + self.beyond <= self.bytes


def _memory_of(plan: Plan) -> list[StageMemory]:
    return [stage_memory(plan, stage) for stage in range(plan.layout.pp)]


# ---- data --------------------------------------------------------------------------------------


def _reading(plan: Plan, measured: Measured, per_node: int) -> Iterator[Hint]:
    """More processes that read, as far as this machine has cores for them."""
    workers, step = plan.config.data.num_workers, measured.step_seconds
    wait = measured.data_wait_seconds
    if wait < LEAST * step:
        return
    readers = max(1, per_node * plan.layout.dp // plan.layout.world_size)  # of a node
    # Without workers the wait is the reading; else they read all the time.
    reading = step * workers if workers else wait
    computing = max(step - wait, 0.01 * step)
    most = (os.cpu_count() or 1) // readers
    number = min(most, -int(-reading // computing))
    if number > workers and _tried(plan, num_workers=number):
        gain = 1 - max(computing, reading / number) / step
        yield Hint(gain=gain, text=(
            f"Reading data takes {wait / step:.0%} of a step: --num-workers {number} in a new run "
            f"would make steps {gain:.0%} shorter."))


# ---- the pipeline ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Busy:
    """Seconds of a step, of all its microbatches."""

    layer: float  # of a language layer
    extra: Rows  # beside layers, [chunk][stage]
    forward: float  # share of the forward

    def pipeline(self, counts: Rows, microbatches: int) -> Pipeline:
        """A step's of a split, its seconds divided over so many microbatches."""
        both = [[(number * self.layer + more) / microbatches for number, more in zip(
            *rows, strict=True)] for rows in zip(counts, self.extra, strict=True)]
        return simulate(
            [[[self.forward * one for one in row] for row in both]],
            [[[(1 - self.forward) * one for one in row] for row in both]],
            microbatches=microbatches, transfer=0.0)

    def over(self, chunks: int) -> _Busy:
        """The same with other chunks a stage: what is first stays first, what is last last."""
        rows = [[0.0] * len(self.extra[0]) for _ in range(chunks)]
        rows[0][:-1], rows[-1][-1] = self.extra[0][:-1], self.extra[-1][-1]
        return _Busy(layer=self.layer, extra=rows, forward=self.forward)


def layer_seconds(plan: Plan, measured: Measured) -> float | None:
    """Of a step, in one language layer; None where it cannot be told from the rest of its stage.

    A stage between the ends holds layers alone. Where there is none, the logits of the last one are
    taken to take the share of FLOPs that they have.
    """
    split, decoder, between, last = plan.split, plan.spec.decoder, [], None
    trained = LANGUAGE not in plan.trainable.frozen
    head = 2 * measured.trained_tokens * decoder.hidden_size * decoder.vocab_size * (2 + trained)
    layer = max(0.0, measured.llm_flops - head) / decoder.num_layers
    for stage, busy in enumerate(measured.busy):
        layers = _count(plan, stage)
        vision = VISION in split.towers and any(
            split.layers(VISION, stage, chunk) for chunk in range(split.vp))
        if not layers or not layer or vision or stage == split.embedding_chunk[0]:
            continue
        if stage == split.pp - 1:
            last = busy * layer / (layers * layer + head)
        else:
            between.append(busy / layers)
    return sum(between) / len(between) if between else last


def _count(plan: Plan, stage: int) -> int:
    return sum(len(plan.split.layers(LANGUAGE, stage, chunk)) for chunk in range(plan.split.vp))


def _busy(plan: Plan, measured: Measured) -> _Busy | None:
    split, layer = plan.split, layer_seconds(plan, measured)
    if layer is None or split.embedding_chunk[0] != 0 or measured.slowest is not None:
        return None  # a slow rank is told of already, and no split mends it
    extra = [[0.0] * split.pp for _ in range(split.vp)]
    for stage, busy in enumerate(measured.busy):
        chunk = split.vp - 1 if stage == split.pp - 1 else 0
        extra[chunk][stage] = max(0.0, busy - _count(plan, stage) * layer)
    return _Busy(layer=layer, extra=extra, forward=sum(measured.forward) / sum(measured.busy))


def _stages(plan: Plan, measured: Measured, room: _Room) -> Iterator[Hint]:
    """Another split of the language layers; where that does not help, over twice the chunks."""
    split, number = plan.split, plan.num_microbatches
    if split.pp == 1 or (busy := _busy(plan, measured)) is None:
        return
    now = busy.pipeline(split.llm, number)
    for chunks in (split.vp, 2 * split.vp):
        if chunks > 1 and (number % split.pp or split.pp * chunks > sum(map(sum, split.llm))):
            continue
        of = busy if chunks == split.vp else busy.over(chunks)
        counts = balanced(sum(map(sum, split.llm)), of.layer, of.extra)
        gain = (now.seconds - of.pipeline(counts, number).seconds) / measured.step_seconds
        if gain < LEAST or (words := _accepted(plan, counts, room)) is None:
            continue
        yield Hint(gain=gain, text=(
            f"{_uneven(measured) if chunks == split.vp else _waits(measured, now)}: {words} would "
            f"make steps {gain:.0%} shorter."))
        return


def _uneven(measured: Measured) -> str:
    busy = measured.busy
    most = max(range(len(busy)), key=lambda stage: busy[stage])
    others = (sum(busy) - busy[most]) / (len(busy) - 1)
    return f"Stage {most} computes {busy[most] / others:.1f} times as long as the others"


def _waits(measured: Measured, now: Pipeline) -> str:
    share = (now.seconds - sum(now.busy) / len(now.busy)) / measured.step_seconds
    return f"Stages wait for one another {share:.0%} of a step"


def _accepted(plan: Plan, counts: Rows, room: _Room) -> str | None:
    """The options of a split that the run would take, in its user's form."""
    parallel, chunks = plan.config.parallel, len(counts)
    options = {} if chunks == plan.split.vp else {"num_virtual_stages_per_pipeline_rank": chunks}
    wanted = tuple(map(tuple, counts))
    listed = ",".join(map(str, counts[0])) if chunks == 1 else json.dumps(
        counts, separators=(",", ":"))
    first = parallel.decoder_first_pipeline_num_layers
    forms = [{"decoder_first_pipeline_num_layers": None, "pp_layers": listed}]
    if parallel.pp_layers is None:  # the shorter ones, where they say the same
        forms.insert(0, {"decoder_first_pipeline_num_layers": counts[0][0]})
        forms[:0] = [{}] if first is None else []
    for form in forms:
        tried = _tried(plan, **options, **form)
        if tried is None or tried.split.llm != wanted or not room.fits(_memory_of(tried)):
            continue
        instead = "" if first is None or "pp_layers" not in form else (
            f" instead of --first-stage-layers {first}")
        said = {"first_stage_layers" if name.startswith("decoder") else name: value
                for name, value in form.items() if value is not None}
        return shlex.join(flags(options | said)) + instead
    return None


def _more_rows(plan: Plan, measured: Measured) -> Iterator[Hint]:
    """Twice the microbatches, between which stages wait the less."""
    rows, number = plan.config.batch.global_batch_size, plan.num_microbatches
    if plan.split.pp == 1 or (busy := _busy(plan, measured)) is None:
        return
    now = busy.pipeline(plan.split.llm, number)
    # A microbatch takes as long as before.
    twice = 2 * busy.pipeline(plan.split.llm, 2 * number).seconds
    gain = (now.seconds - twice / 2) / measured.step_seconds
    if gain >= LEAST and _tried(plan, global_batch_size=2 * rows):
        yield Hint(gain=gain, text=(
            f"{_waits(measured, now)}: --global-batch-size {2 * rows} would take {gain:.0%} less "
            f"time a row, with half as many updates."))


# ---- memory ------------------------------------------------------------------------------------


def _memory(
    plan: Plan, measured: Measured, room: _Room, stages: Sequence[StageMemory], predict: Predict
) -> Iterator[Hint]:
    """Less recompute, or more rows at once, where there is room; by the card's predicted times."""
    if room.bytes is None:
        return
    free, now = room.bytes - max(measured.memory_bytes), predict(plan, stages)
    recompute, rows = plan.config.model.recompute_granularity, plan.config.batch.micro_batch_size
    tries = [({"micro_batch_size": 2 * rows}, f"--micro-batch-size {2 * rows} in a new run")]
    if recompute is not None:
        tries.append(({"recompute_granularity": None}, f"no --recompute-granularity {recompute}"))
    if recompute == "full":
        tries.append(({"recompute_granularity": "selective"}, "--recompute-granularity selective"))
    for options, words in tries:
        tried = _tried(plan, **options)
        if tried is None or not room.fits(held := _memory_of(tried)):
            continue
        gain = 1 - predict(tried, held) / now
        yield Hint(gain=gain, text=(
            f"{free / GIB:.1f} of {room.bytes / GIB:.1f} GiB are free on the fullest rank: {words} "
            f"would make steps about {gain:.0%} shorter."))
