"""The fastest of the layouts that fit, and why the others fell.

What fits is what `train --dry-run` says of the same options: the same plan, weights, gradients,
optimizer and activations. Cheap questions come first: sizes that divide, then what is held whatever
the microbatch is, then activations; the pipeline is run for those alone that could be among the
best.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.models.registry import load_spec
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parallel import VISION, Layout
from megatron_vl.planner.balance import balanced
from megatron_vl.planner.cards import Card
from megatron_vl.planner.held import HeldMemory
from megatron_vl.planner.space import RECOMPUTE, ROWS, Unfit, even, layouts, options_of
from megatron_vl.planner.step_time import (
    Parts,
    StepTime,
    Work,
    chunk_work,
    microbatch,
    parts,
    step_time,
)
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.plan import Plan, plan_run
from megatron_vl.training.stage_memory import StageMemory

BEST = 10  # that are told of
DATA = "DATA"  # in place of a dataset's path


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked."""

    hf_dir: Path  # its config.json is read alone
    gpus: int
    per_node: int
    card: Card
    options: dict[str, object]  # of the run, whatever its layout is
    image_tokens: int  # of one image
    fixed: frozenset[str] = frozenset()  # names of options that every layout keeps

    def plan(self, **more: object) -> Plan:
        """The run of these options and `more`. Raises InputError as `train --dry-run` does."""
        more = {name: value for name, value in more.items() if name not in self.fixed}
        values = {"bf16": True, "train_data_path": DATA, **self.options, **more,
                  "hf_config": str(self.hf_dir)}
        return plan_run(TrainConfig.from_dict(values), self.gpus, here=False)

    def tried(self, name: str, values: Sequence) -> Sequence:
        """Those of an option, or the one that is fixed."""
        return (self.options.get(name),) if name in self.fixed else values


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A layout that fits, or the one that came closest."""

    options: dict[str, object]  # those of the layout, to add to the question's
    plan: Plan
    stages: tuple[StageMemory, ...]
    step: StepTime | None  # None: it does not fit

    @property
    def worst(self) -> StageMemory:
        return max(self.stages, key=lambda one: one.bytes)

    @property
    def tokens_per_second(self) -> float:
        return self.plan.config.batch.global_batch_size * self.plan.row_length / self.step.seconds


@dataclass(kw_only=True, slots=True)
class Found:
    """What a search comes to."""

    best: list[Choice] = field(default_factory=list)  # the fastest first
    fell: Counter[str] = field(default_factory=Counter)  # why, and how many
    fit: int = 0
    closest: Choice | None = None  # of those that do not fit


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    """A layout that fits, before its pipeline is run."""

    options: dict[str, object]
    plan: Plan
    work: Sequence[Sequence[Work]]
    least: float  # seconds a step cannot take less than


def search(question: Question, *, progress: Callable[[Iterable], Iterable] = iter) -> Found:
    """The best layouts.

    Args:
        progress: wraps the list of layouts while they are looked at.

    Raises:
        InputError: options that no layout could mend.
    """
    spec, found, fits, memory = load_spec(question.hf_dir), Found(), [], HeldMemory()
    for layout in progress(list(_layouts(question, spec))):
        if isinstance(layout, Unfit):
            found.fell[layout.reason] += 1
        else:
            fits += _fitting(question, spec, layout, memory, found)
    found.fit = len(fits)
    best: list[tuple[float, int, Choice]] = []  # a heap of the slowest first
    for number, fit in enumerate(sorted(fits, key=lambda fit: fit.least)):
        if len(best) == BEST and fit.least >= -best[0][0]:
            break
        choice = _timed(question, fit, memory)
        heapq.heappush(best, (-choice.step.seconds, -number, choice))
        if len(best) > BEST:
            heapq.heappop(best)
    found.best = [choice for *_, choice in sorted(best, reverse=True, key=lambda one: one[:2])]
    return found


def fits_any(question: Question) -> bool:
    """Whether any layout fits."""
    spec, memory = load_spec(question.hf_dir), HeldMemory()
    return any(True for layout in _layouts(question, spec) if isinstance(layout, Layout)
               for _ in _fitting(question, spec, layout, memory, Found()))


def _layouts(question: Question, spec: ModelSpec) -> Iterator[Layout | Unfit]:
    plan = replace(question, gpus=1).plan()  # what it refuses, no layout could mend
    return layouts(spec, gpus=question.gpus, per_node=question.per_node,
                   row_length=plan.row_length)


def _fitting(
    question: Question, spec: ModelSpec, layout: Layout, memory: HeldMemory, found: Found
) -> Iterator[_Fit]:
    """What fits of a layout: for every number of rows, with the least recompute that does."""
    options = options_of(layout)
    if question.options["global_batch_size"] % layout.dp:
        found.fell["DP does not divide the global batch size"] += 1
        return
    try:
        options |= _split_options(question, spec, layout, options)
    except InputError:
        found.fell["the run's options do not go with it"] += 1
        return
    for rows in question.tried("micro_batch_size", ROWS):
        fit = None
        for recompute in question.tried("recompute_granularity", RECOMPUTE):
            own = options | {"micro_batch_size": rows} | (
                {"recompute_granularity": recompute} if recompute else {})
            try:
                plan = question.plan(**own)
            except InputError:
                found.fell["microbatches do not divide over it"] += 1
                break
            told = _telling_stages(plan)
            if max(memory(plan, stage).device_bytes for stage in told) > question.card.room:
                found.fell["weights, gradients and optimizer alone do not fit"] += 1
                _remember(question, found, own, memory)
                return
            chunks = memory.chunks(plan)
            if all(memory.stage(plan, stage, chunks=chunks).bytes <= question.card.room
                   for stage in told):
                fit = _priced(question, own, plan, chunks)
                break
            found.fell["activations do not fit"] += 1
        else:
            _remember(question, found, own, memory)
        if fit is None:  # with more rows less fits
            return
        yield fit


def _split_options(
    question: Question, spec: ModelSpec, layout: Layout, options: dict[str, object]
) -> dict[str, object]:
    """`pp_layers` by time, where that is not the even split."""
    if layout.pp == 1:
        return {}
    plan = question.plan(**options, pp_layers=str(even(spec, layout)),
                         global_batch_size=layout.dp * layout.pp)
    of = _parts(question, plan, chunks=1)
    extra = [[0.0] * layout.pp for _ in range(layout.vp)]
    extra[0][0] = of.start.seconds + of.vision_layer.seconds * spec.layers.get(VISION, 0)
    extra[-1][-1] += of.end.seconds
    counts = balanced(spec.decoder.num_layers, of.layer.seconds, extra)
    if counts == even(spec, layout) and not spec.decoder.num_layers % (layout.pp * layout.vp):
        return {}
    if layout.vp == 1:
        return {"pp_layers": ",".join(map(str, counts[0]))}
    return {"pp_layers": json.dumps(counts, separators=(",", ":"))}


def _parts(question: Question, plan: Plan, chunks: int) -> Parts:
    return parts(plan, question.card, microbatch(plan, question.image_tokens),
                 per_node=question.per_node, chunks=chunks)


def _telling_stages(plan: Plan) -> list[int]:
    """The first stage of every kind: of those that hold alike, it keeps the most microbatches."""
    split, kinds = plan.split, {}
    for stage in range(plan.layout.pp):
        layers = tuple(len(split.layers(tower, stage, chunk))
                       for tower in split.towers for chunk in range(split.vp))
        last, first = stage == split.pp - 1, stage == split.embedding_chunk[0]
        kinds.setdefault((first, stage > 0, last, layers), stage)
    return list(kinds.values())


def _priced(question: Question, options: dict[str, object], plan: Plan, chunks: int) -> _Fit:
    work = chunk_work(plan, _parts(question, plan, chunks), question.card)
    stages = [sum(row[stage].seconds for row in work) for stage in range(plan.layout.pp)]
    return _Fit(options=options, plan=plan, work=work, least=max(stages) * plan.num_microbatches)


def _timed(question: Question, fit: _Fit, memory: HeldMemory) -> Choice:
    plan, chunks = fit.plan, memory.chunks(fit.plan)
    stages = tuple(memory.stage(plan, stage, chunks=chunks) for stage in range(plan.layout.pp))
    step = step_time(plan, fit.work, [one.held for one in stages], question.card,
                     microbatch(plan, question.image_tokens), per_node=question.per_node)
    return Choice(options=fit.options, plan=plan, stages=stages, step=step)


def _remember(
    question: Question, found: Found, options: dict[str, object], memory: HeldMemory
) -> None:
    """Keeps what needs the least of all that do not fit, every layer recomputed."""
    options = options | {"recompute_granularity": RECOMPUTE[-1]}
    plan = question.plan(**options)
    told, most = _telling_stages(plan), found.closest and found.closest.worst.bytes
    if most and max(memory(plan, stage).device_bytes for stage in told) >= most:
        return
    chunks = memory.chunks(plan)
    stages = tuple(memory.stage(plan, stage, chunks=chunks) for stage in told)
    choice = Choice(options=options, plan=plan, stages=stages, step=None)
    if most is None or choice.worst.bytes < most:
        found.closest = choice
