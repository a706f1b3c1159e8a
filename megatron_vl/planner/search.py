"""The fastest of the layouts that fit, and why the others fell.

What fits is what `train --dry-run` says of the same options: the same plan, weights, gradients,
optimizer and activations. Cheap questions come first: sizes that divide, then what is held whatever
the microbatch is, then activations; the pipeline is run for those alone that could be among the
best.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.models.common.recompute import recompute_of
from megatron_vl.models.registry import load_spec
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parallel import VISION, Layout
from megatron_vl.planner.balance import balanced, spread
from megatron_vl.planner.cards import Card
from megatron_vl.planner.held import HeldMemory
from megatron_vl.planner.microbatch import IMAGE_TOKENS, Microbatch, batch_of, full_row, mean
from megatron_vl.planner.space import (
    BETWEEN,
    RECOMPUTE,
    RECOMPUTE_OPTIONS,
    ROWS,
    Unfit,
    even,
    layouts,
    options_of,
)
from megatron_vl.planner.step_time import (
    Parts,
    StepTime,
    chunk_work,
    needed_flops,
    parts,
    step_time,
)
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.plan import Plan, plan_run
from megatron_vl.training.rows import DataRows
from megatron_vl.training.stage_memory import StageMemory

BEST = 10  # that are told of
ALIKE = 0.01  # by which two predicted steps do not differ
REPLICAS, MICROBATCHES = 4, 64  # whose rows are told apart, and how many of each
DATA = "DATA"  # in place of a dataset's path
SPLIT_OPTIONS = ("pp_layers", "vit_pp_layers")
NO_RECOMPUTE: dict[str, object] = {}
OFFLOAD = {"optimizer_cpu_offload": True}  # tried where nothing fits without


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked."""

    hf_dir: Path  # its config.json is read alone
    gpus: int
    per_node: int
    card: Card
    options: dict[str, object]  # of the run, whatever its layout is
    image_tokens: int = IMAGE_TOKENS  # of one image, where `data` are not known
    dataset: str | None = None  # as --train-data-path names it
    data: DataRows | None = None  # rows of it; None: full of images
    fixed: frozenset[str] = frozenset()  # names of options that every layout keeps

    def plan(self, **more: object) -> Plan:
        """The run of these options and `more`. Raises InputError as `train --dry-run` does."""
        more = {name: value for name, value in more.items() if name not in self.fixed}
        values = {"bf16": True, "train_data_path": DATA, **self.options, **more,
                  "hf_config": str(self.hf_dir)}
        return plan_run(TrainConfig.from_dict(values), self.gpus, here=False)

    @cached_property
    def single(self) -> Plan:
        """The run on one card. Raises InputError: options that no layout could mend."""
        return replace(self, gpus=1).plan()

    @cached_property
    def each(self) -> list[Microbatch]:
        """The rows that are known, or one full of images."""
        if self.data is None:
            return [full_row(self.single, self.image_tokens)]
        return [batch_of(self.single, row) for row in self.data.rows]

    @cached_property
    def row(self) -> Microbatch:
        """The mean row."""
        return mean(self.each)

    def microbatch(self, plan: Plan) -> Microbatch:
        """The mean one."""
        return self.row.times(plan.config.batch.micro_batch_size)

    def microbatches(self, plan: Plan) -> list[list[Microbatch]]:
        """Of some replicas each its own, in turn; the rows that are known, as far as they go."""
        rows = plan.config.batch.micro_batch_size
        known = [sum(self.each[at + 1 : at + rows], start=self.each[at])
                 for at in range(0, len(self.each) - rows + 1, rows)]
        replicas = min(plan.layout.dp, REPLICAS, len(known))
        if len(self.each) == 1 or not replicas:
            return [[self.microbatch(plan)]]
        number = min(plan.num_microbatches, MICROBATCHES, len(known) // replicas)
        return [known[at : at + number] for at in range(0, replicas * number, number)]

    @property
    def rows(self) -> Sequence[int]:
        """Of a microbatch, to try."""
        name = "micro_batch_size"
        return (self.options.get(name, 1),) if name in self.fixed else ROWS

    @property
    def recompute(self) -> Sequence[dict[str, object]]:
        """Options to try, from the fastest to the smallest; what is fixed is the same in all."""
        kept = {name: self.options[name] for name in RECOMPUTE_OPTIONS if name in self.fixed}
        levels = ({},) if RECOMPUTE_OPTIONS[0] in kept else RECOMPUTE
        return [level | kept for level in levels]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A layout that fits, or the one that came closest."""

    options: dict[str, object]  # those of the layout, to add to the question's
    plan: Plan
    stages: tuple[StageMemory, ...]
    step: StepTime | None  # None: it does not fit
    tokens: float = 0.0  # of a step, without padding

    @property
    def worst(self) -> StageMemory:
        return max(self.stages, key=lambda one: one.bytes)

    def order(self) -> tuple:
        """Of two that are alike within what a prediction can tell, the one that waits less."""
        alike = round(math.log(self.step.seconds) / math.log1p(ALIKE))
        return alike, round(self.step.pipeline.bubble, 2), self.plan.layout.tp, self.step.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step.seconds


@dataclass(kw_only=True, slots=True)
class Found:
    """What a search comes to."""

    best: list[Choice] = field(default_factory=list)  # the fastest first
    fell: Counter[str] = field(default_factory=Counter)  # why, and how many
    fit: int = 0
    refusal: str = ""  # the first that the run's options met
    closest: Choice | None = None  # of those that do not fit

    def refused(self, error: InputError) -> None:
        """Of a layout that the run's options do not go with."""
        self.refusal = self.refusal or str(error)
        self.fell[f"the run's options do not go with it, as: {self.refusal}"] += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    """A layout that fits, before its pipeline is run."""

    options: dict[str, object]
    plan: Plan
    least: float  # seconds a step cannot take less than


def search(question: Question, *, progress: Callable[[Iterable], Iterable] = iter) -> Found:
    """The best layouts.

    Args:
        progress: wraps the list of layouts while they are looked at.

    Raises:
        InputError: options that no layout could mend.
    """
    spec = load_spec(question.hf_dir)
    everything = list(_layouts(question, spec))

    def fitting(question: Question) -> tuple[Found, HeldMemory, list[_Fit]]:
        found, fits, memory = Found(), [], HeldMemory()
        for layout in progress(everything):
            if isinstance(layout, Unfit):
                found.fell[layout.reason] += 1
            else:
                fits += _fitting(question, spec, layout, memory, found)
        # A split that balances one recompute may be another's.
        once = {frozenset(fit.options.items()): fit for fit in fits}
        return found, memory, [*once.values()]

    found, memory, fits = fitting(question)
    if not fits and found.closest is not None:
        question = replace(question, options=question.options | OFFLOAD)
        offloaded, memory, fits = fitting(question)
        found = offloaded if fits else found
    found.fit = len(fits)
    best: list[tuple[float, int, Choice]] = []  # a heap of the slowest first
    for number, fit in enumerate(sorted(fits, key=lambda fit: fit.least)):
        if len(best) == BEST and fit.least >= -best[0][0]:
            break
        choice = _timed(question, fit, memory)
        heapq.heappush(best, (-choice.step.seconds, -number, choice))
        if len(best) > BEST:
            heapq.heappop(best)
    found.best = sorted((choice for *_, choice in best), key=Choice.order)
    return found


def fits_any(question: Question) -> bool:
    """Whether any layout fits."""
    spec, memory = load_spec(question.hf_dir), HeldMemory()
    return any(True for layout in _layouts(question, spec) if isinstance(layout, Layout)
               for _ in _fitting(question, spec, layout, memory, Found()))


def _layouts(question: Question, spec: ModelSpec) -> Iterator[Layout | Unfit]:
    return layouts(spec, gpus=question.gpus, per_node=question.per_node,
                   row_length=question.single.row_length)


def _fitting(
    question: Question, spec: ModelSpec, layout: Layout, memory: HeldMemory, found: Found
) -> Iterator[_Fit]:
    """What fits of a layout: of every split and number of rows, with the least recompute that
    does."""
    if question.options["global_batch_size"] % layout.dp:
        found.fell["DP does not divide the global batch size"] += 1
        return
    options = options_of(layout)
    try:
        splits = _splits(question, spec, layout, options)
    except InputError as error:
        found.refused(error)
        return
    for split in splits:
        yield from _of_split(question, spec, layout, options | split, memory, found)


def _of_split(
    question: Question, spec: ModelSpec, layout: Layout, options: dict[str, object],
    memory: HeldMemory, found: Found,
) -> Iterator[_Fit]:
    free = not question.fixed.intersection(RECOMPUTE_OPTIONS)
    for rows in question.rows:
        microbatches, rest = divmod(question.options["global_batch_size"], layout.dp * rows)
        if rest:
            found.fell["DP x rows of a microbatch do not divide the global batch size"] += 1
            return
        if layout.vp > 1 and microbatches % layout.pp:
            found.fell["virtual stages need a multiple of PP microbatches"] += 1
            return
        own = options | {"micro_batch_size": rows}
        try:
            plan = question.plan(**own)
        except InputError as error:
            found.refused(error)
            return
        told = _telling_stages(plan)
        if max(memory(plan, stage).device_bytes for stage in told) > question.card.room:
            found.fell["weights, gradients and optimizer alone do not fit"] += 1
            _remember(question, found, own, memory)
            return
        for level, more in enumerate(question.recompute):
            if fits := list(_fits_with([more], question, own, plan, told, memory)):
                # Where both towers need so much, one of them may do with less.
                between = BETWEEN.get(level, ()) if plan.spec.vision is not None and free else ()
                fits += _fits_with(between, question, own, plan, told, memory)
                best = min(fits, key=lambda one: one.least)
                yield best
                yield from _balanced_again(question, spec, best, told, memory)
                break
            found.fell["activations do not fit"] += 1
        else:  # with more rows less fits
            _remember(question, found, own, memory)
            return


def _fits_with(
    levels: Iterable[dict[str, object]], question: Question, options: dict[str, object], plan: Plan,
    told: Sequence[int], memory: HeldMemory,
) -> Iterator[_Fit]:
    """What fits, of these recomputations."""
    for level in levels:
        again = _again(plan, level)
        chunks = memory.chunks(again)
        if all(memory.stage(again, stage, chunks=chunks).bytes <= question.card.room
               for stage in told):
            yield _priced(question, options | level, again, chunks)


def _balanced_again(
    question: Question, spec: ModelSpec, fit: _Fit, told: Sequence[int], memory: HeldMemory
) -> Iterator[_Fit]:
    """What fits of other splits, which balance what the recompute of this one adds."""
    level = {name: fit.options[name] for name in RECOMPUTE_OPTIONS if name in fit.options}
    if not level:
        return
    own = {name: value for name, value in fit.options.items()
           if name not in (*level, *SPLIT_OPTIONS)}
    for split in _splits(question, spec, fit.plan.layout, options_of(fit.plan.layout), level):
        if split != {name: fit.options[name] for name in SPLIT_OPTIONS if name in fit.options}:
            plan = question.plan(**own, **split)
            yield from _fits_with([level], question, own | split, plan, told, memory)


def _again(plan: Plan, level: dict[str, object]) -> Plan:
    """The plan with so much recompute."""
    recompute, vit_recompute = recompute_of(
        plan.split, granularity=level.get("recompute_granularity"),
        vit_granularity=level.get("vit_recompute_granularity", "same"))
    return replace(plan, recompute=recompute, vit_recompute=vit_recompute)


def _splits(
    question: Question, spec: ModelSpec, layout: Layout, options: dict[str, object],
    level: dict[str, object] = NO_RECOMPUTE,
) -> list[dict[str, object]]:
    """Splits by time, with so much recompute, as options: the tower on stage 0; and over the first
    stages, where its layers take longer than a stage's share. `pp_layers` is left out where it is
    the even split."""
    if layout.pp == 1:
        return [{}]
    plan = _again(question.plan(**options, pp_layers=str(even(spec, layout)),
                                global_batch_size=layout.dp * layout.pp), level)
    of = parts_of(question, plan, chunks=1)
    vision, number = spec.layers.get(VISION, 0), spec.decoder.num_layers
    tower = of.vision_layer.seconds

    def split(on_stages: Sequence[int]) -> tuple[list[list[int]], float]:
        """Language layers beside these of the tower, and seconds of the busiest stage."""
        extra = [[0.0] * layout.pp for _ in range(layout.vp)]
        extra[0] = [count * tower for count in on_stages]
        first = max((at for at, count in enumerate(on_stages) if count), default=0)
        extra[0][first] += of.start.seconds
        extra[-1][-1] += of.end.seconds
        counts = balanced(number, of.layer.seconds, extra, first=first)
        return counts, max(
            sum(counts[chunk][stage] * of.layer.seconds + extra[chunk][stage]
                for chunk in range(layout.vp)) for stage in range(layout.pp))

    whole, busiest = split([vision] + [0] * (layout.pp - 1))
    usual = whole == even(spec, layout) and not number % (layout.pp * layout.vp)
    found = [{} if usual else {"pp_layers": _listed(whole)}]
    total = (of.start + of.end).seconds + vision * tower + number * of.layer.seconds
    over = spread(vision, tower, stages=layout.pp, share=total / layout.pp / layout.vp)
    if over is not None:
        counts, less = split(over)
        if less < busiest:
            rows = [over, *([[0] * layout.pp] * (layout.vp - 1))]
            found.append({"pp_layers": _listed(counts), "vit_pp_layers": _listed(rows)})
    return found


def _listed(rows: list[list[int]]) -> str:
    """As pp-layers takes it."""
    if len(rows) == 1:
        return ",".join(map(str, rows[0]))
    return json.dumps(rows, separators=(",", ":"))


def parts_of(question: Question, plan: Plan, chunks: int = 1) -> Parts:
    """What the chunks of a layout are made of."""
    return parts(plan, question.card, question.microbatch(plan), per_node=question.per_node,
                 chunks=chunks)


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
    work = chunk_work(plan, parts_of(question, plan, chunks), question.card)
    stages = [sum(row[stage].seconds for row in work) for stage in range(plan.layout.pp)]
    return _Fit(options=options, plan=plan, least=max(stages) * plan.num_microbatches)


def _timed(question: Question, fit: _Fit, memory: HeldMemory) -> Choice:
    plan, chunks = question.plan(**fit.options), memory.chunks(fit.plan)
    stages = tuple(memory.stage(plan, stage, chunks=chunks) for stage in range(plan.layout.pp))
    # Replicas wait for the one whose rows take longest; what all of them need is the mean's.
    step = max((_step(question, plan, batches, stages, chunks)
                for batches in question.microbatches(plan)), key=lambda one: one.seconds)
    step = replace(step, flops=needed_flops(plan, [question.microbatch(plan)]))
    offload = {name: question.options[name] for name in OFFLOAD if name in question.options}
    return Choice(options=fit.options | offload, plan=plan, stages=stages, step=step,
                  tokens=question.row.sample_tokens * plan.config.batch.global_batch_size)


def _step(
    question: Question, plan: Plan, batches: Sequence[Microbatch], stages: Sequence[StageMemory],
    chunks: int,
) -> StepTime:
    card, per_node = question.card, question.per_node
    of = [parts(plan, card, one, per_node=per_node, chunks=chunks) for one in batches]
    return step_time(plan, of, [one.held for one in stages], card, batches, per_node=per_node)


def _remember(
    question: Question, found: Found, options: dict[str, object], memory: HeldMemory
) -> None:
    """Keeps what needs the least of all that do not fit, every layer recomputed."""
    options = options | question.recompute[-1]
    plan = question.plan(**options)
    told, most = _telling_stages(plan), found.closest and found.closest.worst.bytes
    if most and max(memory(plan, stage).device_bytes for stage in told) >= most:
        return
    chunks = memory.chunks(plan)
    stages = tuple(memory.stage(plan, stage, chunks=chunks) for stage in told)
    choice = Choice(options=options, plan=plan, stages=stages, step=None)
    if most is None or choice.worst.bytes < most:
        found.closest = choice
