"""SVG of a plan: the pipeline's timeline, memory by stage, and the layouts against one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_vl.pages import escape
from megatron_vl.parallel import VISION
from megatron_vl.planner.cards import GB, Card
from megatron_vl.planner.schedule import Ran
from megatron_vl.planner.search import Choice
from megatron_vl.training.dry_run import GIB

WIDTH, LEFT, RIGHT = 1060, 62, 12  # pixels of a drawing, and beside what is drawn
MOST_OPERATIONS = 160  # of a stage, or its middle is cut out
GAP = 34  # pixels in place of the middle
TIMES = {
    "tower, forward": "#f2c14e", "tower, backward": "#e08700", "language, forward": "#8ecae6",
    "language, backward": "#0072b2", "gradients and update": "#009e73", "waiting": "#eef1f4",
}
BYTES = {"weights": "#0072b2", "gradients": "#8ecae6", "optimizer": "#009e73",
         "activations kept": "#e08700", "a moment's more": "#f2c14e"}
STYLE = """svg { display: block; max-width: 100%; height: auto; margin: .4em 0; }
svg text { font-size: 11px; fill: #444; } svg .on { font-size: 9px; }
svg .dark { fill: #fff; }
svg .room { stroke: #d55e00; stroke-width: 1.5; } svg .grid { stroke: #ddd; }
"""


@dataclass(slots=True)
class _Shapes:
    """Rectangles, one path of each colour."""

    paths: dict[str, list[str]] = field(default_factory=dict)

    def add(self, color: str, x: float, y: float, width: float, height: float) -> None:
        if width > 0:
            self.paths.setdefault(color, []).append(
                f"M{x:.1f} {y:.1f}h{width:.2f}v{height:.1f}h{-width:.2f}z")

    def svg(self) -> str:
        return "".join(f'<path fill="{color}" d="{"".join(path)}"/>'
                       for color, path in self.paths.items())


@dataclass(frozen=True, slots=True)
class _Axis:
    """Seconds to pixels; between `until` and `again` nothing is drawn."""

    end: float
    until: float
    again: float

    @classmethod
    def of(cls, choice: Choice) -> _Axis:
        pipeline, end = choice.step.pipeline, choice.step.seconds
        number, stages = len(pipeline.timeline[0]), len(pipeline.timeline)
        shown = max(MOST_OPERATIONS, 4 * stages * choice.plan.layout.vp)
        if number <= shown:
            return cls(end, end, end)
        half = end * shown / number / 2
        return cls(end, half, end - half)

    @property
    def cut(self) -> bool:
        return self.until < self.again

    def __call__(self, seconds: float) -> float:
        room = WIDTH - LEFT - RIGHT - GAP * self.cut
        scale = room / (self.until + self.end - self.again)
        if seconds <= self.until:
            return LEFT + seconds * scale
        return LEFT + GAP + (self.until + max(0.0, seconds - self.again)) * scale

    def pieces(self, start: float, end: float) -> Iterator[tuple[float, float]]:
        """What is drawn of a time, in pixels from one to the other."""
        for low, high in ((0.0, self.until), (self.again, self.end)) if self.cut else (
                (0.0, self.end),):
            first, last = max(start, low), min(end, high)
            if first < last:
                # The second part begins where the gap ends.
                yield (self(first) if first > self.until or low == 0.0 else self.begin, self(last))

    @property
    def begin(self) -> float:
        """Where the second part begins, in pixels."""
        return self(self.until) + GAP


def timeline(choice: Choice) -> str:
    """A row a stage: what it does when, from the step's start to its end."""
    axis, step, split = _Axis.of(choice), choice.step, choice.plan.split
    stages = len(step.pipeline.timeline)
    height = _row_height(stages)
    shapes, words = _Shapes(), []
    for stage, ran in enumerate(step.pipeline.timeline):
        y = 8 + stage * height
        for start, end in axis.pieces(0.0, axis.end):
            shapes.add(TIMES["waiting"], start, y, end - start, height - 2)
        for one in ran:
            chunk, backward = one.operation.chunk, one.operation.backward
            layers = len(split.layers(VISION, stage, chunk)) if VISION in split.towers else 0
            kind = "backward" if backward else "forward"
            which = one.operation.microbatch % len(step.works)
            whole = getattr(step.works[which][chunk][stage], kind)
            tower = layers * getattr(step.parts[which].vision_layer, kind)
            share = min(1.0, tower / whole) if whole else 0.0
            # The tower runs first, and backward last.
            at = one.end - (one.end - one.start) * share if backward else (
                one.start + (one.end - one.start) * share)
            parts = [("language", one.start, at), ("tower", at, one.end)] if backward else [
                ("tower", one.start, at), ("language", at, one.end)]
            for part, begin, finish in parts:
                for left, right in axis.pieces(begin, finish):
                    gap = min(0.6, (right - left) / 8)  # so that neighbours are told apart
                    shapes.add(TIMES[f"{part}, {kind}"], left, y, right - left - gap, height - 2)
            if height > 15:
                words += _numbered(one, axis.pieces(one.start, one.end), y + height / 2 + 2,
                                   digits=len(str(choice.plan.num_microbatches)))
        for left, right in axis.pieces(step.pipeline.ends[stage], step.ends[stage]):
            shapes.add(TIMES["gradients and update"], left, y, right - left, height - 2)
    bottom = 8 + stages * height
    parts = [shapes.svg(), *words, *_stage_names(stages, height),
             *_ticks(axis, bottom, lambda value: f"{value:g} s")]
    more = "<span>1, 2, . . . are microbatches</span>" if words else ""
    if axis.cut:
        middle = axis(axis.until) + GAP / 2
        parts.append(f'<text x="{middle:.1f}" y="{bottom / 2 + 8:.0f}" text-anchor="middle">'
                     f'. . .</text>')
        more += f"<span>. . . {axis.again - axis.until:.2f} s are left out</span>"
    colors = {name: color for name, color in TIMES.items()
              if color in shapes.paths or name == "waiting"}
    return _drawing(bottom + 22, parts, "the pipeline of a step") + _legend(colors, more)


def memory(choice: Choice, card: Card) -> str:
    """A bar a stage: what its fullest rank holds, and what a run may fill."""
    stages = len(choice.stages)
    height, most = _row_height(stages), max(
        card.memory_gb * GB, *(one.bytes for one in choice.stages))
    scale = (WIDTH - LEFT - RIGHT) / most
    shapes = _Shapes()
    for stage, one in enumerate(choice.stages):
        held, kept, x = one.held, one.activations.kept, float(LEFT)
        for color, number in zip(BYTES.values(), (
            held.weight_bytes, held.gradient_bytes, held.optimizer_bytes, kept,
            one.activations.peak - kept,
        ), strict=True):
            shapes.add(color, x, 20 + stage * height, number * scale, height - 2)
            x += number * scale
    bottom, room = 20 + stages * height, LEFT + card.room * scale
    axis = _Axis(most / GIB, most / GIB, most / GIB)
    return _drawing(bottom + 22, [
        *_ticks(axis, bottom, lambda value: f"{value:g} GiB"), shapes.svg(),
        *_stage_names(stages, height, top=20),
        f'<line class="room" x1="{room:.1f}" x2="{room:.1f}" y1="16" y2="{bottom + 4}"/>'
        f'<text x="{room - 4:.1f}" y="12" text-anchor="end">a run may fill '
        f'{card.room / GIB:.1f} GiB</text>',
    ], "memory of every stage") + _legend(BYTES)


def scatter(best: Sequence[Choice]) -> str:
    """The layouts by their numbers: tokens/s to the right, GiB upwards."""
    across = [one.tokens_per_second for one in best]
    upwards = [one.worst.bytes / GIB for one in best]
    height, dots = 190, []
    x_of = _scaled(across, LEFT + 30, WIDTH - 60)
    y_of = _scaled(upwards, height - 16, 22)
    for number, (x, y) in enumerate(zip(map(x_of, across), map(y_of, upwards), strict=True), 1):
        fill, ink = ("#0072b2", "#fff") if number == 1 else ("#e6f0fa", "#222")
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="10" fill="{fill}" stroke="#0072b2"/>'
                    f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" '
                    f'style="fill:{ink}">{number}</text>')
    ends = []
    for value in dict.fromkeys((min(across), max(across))):
        ends.append(f'<text x="{x_of(value):.1f}" y="{height + 14}" text-anchor="middle">'
                    f'{value:,.0f} tokens/s</text>')
    for value in dict.fromkeys((min(upwards), max(upwards))):
        ends.append(f'<text x="{LEFT - 8}" y="{y_of(value) + 4:.1f}" text-anchor="end">'
                    f'{value:.1f} GiB</text>')
    frame = (f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>'
             f'<line class="grid" x1="{LEFT}" x2="{LEFT}" y1="6" y2="{height}"/>')
    # Drawn from the last on, so that the better one is in front.
    return _drawing(height + 22, [frame, *ends, *reversed(dots)], "tokens/s and GiB of the layouts")


def _scaled(values: Sequence[float], low: float, high: float) -> Callable[[float], float]:
    least, most = min(values), max(values)
    return lambda value: (low + high) / 2 if most == least else (
        low + (value - least) / (most - least) * (high - low))


def _row_height(stages: int) -> int:
    return 22 if stages <= 16 else 14 if stages <= 32 else 9


def _numbered(
    one: Ran, pieces: Iterable[tuple[float, float]], y: float, *, digits: int
) -> Iterator[str]:
    """The number of a microbatch, from 1, where one of so many digits has room."""
    number = str(one.operation.microbatch + 1)
    for left, right in pieces:
        if right - left > 7 * digits:
            yield (f'<text class="on{" dark" * one.operation.backward}" '
                   f'x="{(left + right) / 2:.1f}" y="{y:.1f}" text-anchor="middle">{number}'
                   f'</text>')


def _stage_names(stages: int, height: int, *, top: int = 8) -> Iterator[str]:
    each = 1 if height > 10 else 4
    for stage in range(0, stages, each):
        yield (f'<text x="{LEFT - 8}" y="{top + stage * height + height / 2 + 3:.1f}" '
               f'text-anchor="end">stage {stage}</text>')


def _ticks(axis: _Axis, bottom: int, named: Callable[[float], str]) -> Iterator[str]:
    span = axis.until + axis.end - axis.again
    step = next(size * 10.0**power for power in range(-6, 7) for size in (1, 2, 5)
                if span / (size * 10.0**power) <= 10)
    for number in range(int(axis.end / step) + 1):
        value = round(number * step, 9)
        if axis.until < value < axis.again:
            continue
        x = axis(value)
        if x < WIDTH - RIGHT - 14:
            yield (f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
                   f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{named(value)}'
                   f'</text>')


def _legend(colors: dict[str, str], more: str = "") -> str:
    return "<p class=legend>" + "".join(
        f'<span><i style="background:{color}"></i>{escape(name)}</span>'
        for name, color in colors.items()) + f"{more}</p>\n"


def _drawing(height: float, parts: Iterable[str], what: str) -> str:
    return (f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img" '
            f'aria-label="{escape(what)}">{"".join(parts)}</svg>\n')
