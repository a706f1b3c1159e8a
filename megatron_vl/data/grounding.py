"""Objects in images: from the numbers of a shard to the words of a model's family. Pure Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

from megatron_vl.data.conversation import BadEntry, Box, Part, Turn
from megatron_vl.models.media import IMAGE
from megatron_vl.models.spec import Grounding, JsonGrounding

Pixels = Callable[[int], tuple[int, int]]  # width and height of one of a sample's media, resized


def measured(turns: Sequence[Turn], sizes: Sequence[tuple[int, int]]) -> tuple[Turn, ...]:
    """The turns with every box in pixels beside the size of its image.

    Args:
        sizes: width and height of each of the entry's media, in order.

    Raises:
        BadEntry: a box that is not within its image.
    """
    def measure(part: Part) -> Part:
        if part.box is None or part.box.size is not None:
            return part
        box = replace(part.box, size=sizes[part.box.image])
        in_parts(box, (1000, 1000))
        return replace(part, box=box)

    return _each(turns, measure)


def check_boxes(turns: Sequence[Turn]) -> None:
    """Raises BadEntry: a box that is not within its image, where that can be told already."""
    for turn in turns:
        for part in turn.parts:
            if part.box is not None and part.box.size is not None:
                in_parts(part.box, (1000, 1000))


def in_parts(box: Box, scale: tuple[int, int]) -> list[tuple[int, int]]:
    """The points of a box in parts of its image's width and height, `scale` of each, from 0.

    They are rounded; a point on the right or lower edge is in the last part.

    Raises:
        BadEntry: a point that is not within the image.
    """
    made = []
    for point in box.points:
        place = [round(at * parts / side)
                 for at, side, parts in zip(point, box.size, scale, strict=True)]
        if not all(0 <= at <= parts for at, parts in zip(place, scale, strict=True)):
            raise BadEntry(
                "bad box",
                f"it has the box {written(box.points)}, which is not within (0,0) and "
                f"({box.size[0]:g},{box.size[1]:g}), the corners of its image",
            )
        made.append(tuple(min(at, parts - 1) for at, parts in zip(place, scale, strict=True)))
    return made


def written(points: Sequence[tuple[float, float]]) -> str:
    """`(x1,y1),(x2,y2)`."""
    return ",".join(f"({x:g},{y:g})" for x, y in points)


def render(
    turns: Sequence[Turn], form: Grounding | JsonGrounding | None, known: Callable[[str], bool],
    pixels: Pixels | None = None,
) -> Sequence[Turn]:
    """The turns with their objects in the family's words, as text.

    Args:
        form: the family's; None: it has none.
        known: whether a mark is one of the tokenizer's own tokens.
        pixels: the size that an image is resized to; JSON needs it.

    Raises:
        BadEntry: the model has no words for objects, or for one of these.
    """
    if all(part.ref is None and part.box is None for turn in turns for part in turn.parts):
        return turns
    if form is None:
        raise BadEntry("not served", "it names objects in images, but the model's family has no "
                                     "form for them")
    if isinstance(form, JsonGrounding):
        return _in_json(turns, form, pixels)

    def write(part: Part) -> Part:
        if part.ref is None and part.box is None:
            return part
        if part.ref is not None:
            marks, text = form.ref, part.ref
        else:
            marks = form.quad if len(part.box.points) == 4 else form.box
            points = in_parts(part.box, (form.scale, form.scale))
            text = ",".join(f"({x},{y})" for x, y in points)
        for mark in marks:
            if not known(mark):
                raise BadEntry("not served", f"it names objects in images, but the model's "
                                             f"tokenizer has no {mark} to write them with")
        return Part(text=text.join(marks))

    return tuple(_joined(turn) for turn in _each(turns, write))


def _in_json(turns: Sequence[Turn], form: JsonGrounding, pixels: Pixels) -> tuple[Turn, ...]:
    """The turns with their objects as JSON: one an object, several side by side a list of them.

    A box alone does not say what is in it. Its label is the name right before it; of an answer's
    box without one, the name that the question asks for, if it asks for one alone; otherwise there
    is none. A name that is no label is text.
    """
    images = [number for number, kind in enumerate(kind for turn in turns for kind in turn.media)
              if kind == IMAGE]

    def write(box: Box, label: dict[str, str]) -> str:
        if len(box.points) == 4:
            raise BadEntry("not served", "it has a place with four corners, for which the model's "
                                         "family has no form; give the two corners of a box")
        if form.scale is None and box.image is None and len(images) != 1:
            raise BadEntry("not served", f"it has a box that does not say which of its "
                                         f"{len(images)} images it is in, and the model's family "
                                         f"counts that image's pixels; give image_id, and prepare "
                                         f"it again")
        if form.scale is not None:
            scale = form.scale, form.scale
        else:
            scale = pixels(images[0] if box.image is None else box.image)
        numbers = [at for point in in_parts(box, scale) for at in point]
        key = form.point if len(box.points) == 1 else form.box
        return json.dumps({key: numbers, **label}, ensure_ascii=False)

    written, asked = [], set()
    for turn in turns:
        parts: list[Part] = []
        for is_box, run in groupby(turn.parts, key=lambda part: part.box is not None):
            if not is_box:
                parts += run
                continue
            name = None
            if parts and parts[-1].ref is not None:
                name = parts.pop().ref
            elif turn.role == "assistant" and len(asked) == 1:
                (name,) = asked
            label = {} if name is None else {form.label: name}
            objects = [write(part.box, label) for part in run]
            listed = objects[0] if len(objects) == 1 else "[\n\t" + ",\n\t".join(objects) + "\n]"
            parts.append(Part(text=listed))
        if turn.role == "user":
            asked = {part.ref for part in parts if part.ref is not None}
        parts = [part if part.ref is None else Part(text=part.ref) for part in parts]
        written.append(_joined(replace(turn, parts=tuple(parts))))
    return tuple(written)


def _each(turns: Sequence[Turn], change: Callable[[Part], Part]) -> tuple[Turn, ...]:
    """The turns with every part changed."""
    return tuple(replace(turn, parts=tuple(map(change, turn.parts))) for turn in turns)


def _joined(turn: Turn) -> Turn:
    """The turn; neighbours that are text become one."""
    return replace(turn, parts=tuple(
        part for is_text, run in groupby(turn.parts, key=lambda part: part.text is not None)
        for part in ([Part(text="".join(p.text for p in run))] if is_text else run)
    ))
