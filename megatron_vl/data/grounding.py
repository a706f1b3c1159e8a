"""Objects in images: from the numbers of a shard to the words of a model's family. Pure Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

from megatron_vl.data.conversation import BadEntry, Box, Part, Turn
from megatron_vl.models.spec import Grounding


def measured(turns: Sequence[Turn], sizes: Sequence[tuple[int, int]]) -> tuple[Turn, ...]:
    """The turns with every box in pixels beside the size of its image.

    Args:
        sizes: width and height of each of the entry's media, in order.

    Raises:
        BadEntry: a box that is not within its image.
    """
    def measure(part: Part) -> Part:
        if part.box is None or part.box.image is None:
            return part
        box = replace(part.box, size=sizes[part.box.image], image=None)
        in_parts(box, 1000)
        return replace(part, box=box)

    return _each(turns, measure)


def check_boxes(turns: Sequence[Turn]) -> None:
    """Raises BadEntry: a box that is not within its image, where that can be told already."""
    for turn in turns:
        for part in turn.parts:
            if part.box is not None and part.box.size is not None:
                in_parts(part.box, 1000)


def in_parts(box: Box, scale: int) -> list[tuple[int, int]]:
    """The points of a box in parts of its image's sides, from 0 up to and without `scale`.

    They are rounded; a point on the right or lower edge, `scale`, is in the last part.

    Raises:
        BadEntry: a point that is not within the image.
    """
    made = []
    for point in box.points:
        x, y = (round(at * scale / side) for at, side in zip(point, box.size, strict=True))
        if not (0 <= x <= scale and 0 <= y <= scale):
            raise BadEntry(
                "bad box",
                f"it has the box {written(box.points)}, which is not within (0,0) and "
                f"({box.size[0]:g},{box.size[1]:g}), the corners of its image",
            )
        made.append((min(x, scale - 1), min(y, scale - 1)))
    return made


def written(points: Sequence[tuple[float, float]]) -> str:
    """`(x1,y1),(x2,y2)`."""
    return ",".join(f"({x:g},{y:g})" for x, y in points)


def render(
    turns: Sequence[Turn], form: Grounding | None, known: Callable[[str], bool]
) -> Sequence[Turn]:
    """The turns with their objects in the family's words, as text.

    Args:
        form: the family's; None: it has none.
        known: whether a mark is one of the tokenizer's own tokens.

    Raises:
        BadEntry: the model has no words for objects.
    """
    if all(part.ref is None and part.box is None for turn in turns for part in turn.parts):
        return turns

    def write(part: Part) -> Part:
        if part.ref is None and part.box is None:
            return part
        if form is None:
            raise BadEntry("not served", "it names objects in images, but the model's family has "
                                         "no form for them")
        if part.ref is not None:
            marks, text = form.ref, part.ref
        else:
            marks = form.quad if len(part.box.points) == 4 else form.box
            points = in_parts(part.box, form.scale)
            text = ",".join(f"({x},{y})" for x, y in points)
        for mark in marks:
            if not known(mark):
                raise BadEntry("not served", f"it names objects in images, but the model's "
                                             f"tokenizer has no {mark} to write them with")
        return Part(text=text.join(marks))

    return _each(turns, write, join=True)


def _each(
    turns: Sequence[Turn], change: Callable[[Part], Part], *, join: bool = False
) -> tuple[Turn, ...]:
    """The turns with every part changed; `join`: neighbours that are text become one."""
    made = []
    for turn in turns:
        parts = [change(part) for part in turn.parts]
        if join:
            parts = [
                part for is_text, run in groupby(parts, key=lambda part: part.text is not None)
                for part in ([Part(text="".join(p.text for p in run))] if is_text else run)
            ]
        made.append(replace(turn, parts=tuple(parts)))
    return tuple(made)
