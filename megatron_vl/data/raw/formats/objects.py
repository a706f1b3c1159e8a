"""Objects in an entry's images, as ms-swift has them.

    {"messages": [{"role": "user", "content": "<image>Find the <ref-object>"},
                  {"role": "assistant", "content": "<bbox><bbox>"}], "images": ["0.jpg"],
     "objects": {"ref": ["sheep"], "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]}}

| key of `objects` | |
|---|---|
| `ref` | what stands at each `<ref-object>`, in turn |
| `bbox` | what stands at each `<bbox>`: `[x, y]`, `[x1, y1, x2, y2]` or four corners |
| `bbox_type` | `real`: pixels of the image, the default; `norm1`: parts of its sides |
| `image_id` | the image of each box, from 0; 0 where it is not said |

Two corners the wrong way round are the same box, and are turned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_vl.data.conversation import BadEntry, Box, MediaSource, Part, Turn
from megatron_vl.data.raw.formats.tools import parsed
from megatron_vl.data.raw.formats.turns import describe
from megatron_vl.models.media import IMAGE

_MARK = re.compile(r"<(ref-object|bbox)>")


def place_objects(
    turns: Sequence[Turn], media: Sequence[MediaSource], entry: dict
) -> tuple[Turn, ...]:
    """The turns with an entry's objects in the places of their marks.

    In an entry without objects a mark is text where a question asks for it, and refused in an
    answer: the model would learn to say the mark.

    Raises:
        BadEntry: no such objects, or other marks than objects.
    """
    if not any(_MARK.search(part.text or "") for turn in turns for part in turn.parts):
        return tuple(turns)  # `objects` are then others' notes, counted as a key that is not read
    refs, boxes = [], []
    if "objects" in entry:
        refs, boxes = _objects(entry.get("objects"), [m.kind for m in media])
    queues = {"ref-object": iter(refs), "bbox": iter(boxes)}
    given = {"ref-object": len(refs), "bbox": len(boxes)}
    marks = dict.fromkeys(given, 0)
    for turn in turns:
        if any(given.values()) or turn.role == "assistant":
            for part in turn.parts:
                for mark in _MARK.findall(part.text or ""):
                    marks[mark] += 1
    for mark, count in marks.items():
        if count != given[mark]:
            key = "ref" if mark == "ref-object" else "bbox"
            raise BadEntry(
                "mark count",
                f"it has {count} marks <{mark}> for {given[mark]} in the `{key}` of its `objects`",
            )
    if not any(given.values()):
        return tuple(turns)
    return tuple(
        replace(turn, parts=tuple(one for part in turn.parts for one in _placed(part, queues)))
        for turn in turns
    )


def box_of(numbers: Sequence[float], *, size=None, image: int | None = None) -> Box:
    """A point, a box whose corners are put in order, or four corners."""
    points = tuple((float(x), float(y)) for x, y in zip(numbers[::2], numbers[1::2], strict=True))
    if len(points) == 2:
        (x1, x2), (y1, y2) = (sorted(one) for one in zip(*points, strict=True))
        points = (x1, y1), (x2, y2)
    return Box(points=points, size=size, image=image)


def _placed(part: Part, queues: dict[str, Iterator[Part]]) -> Iterator[Part]:
    if part.text is None:
        yield part
        return
    *pieces, last = _MARK.split(part.text)
    for text, mark in zip(pieces[::2], pieces[1::2], strict=True):
        if text:
            yield Part(text=text)
        yield next(queues[mark])
    if last or not pieces:
        yield Part(text=last)


def _objects(objects, kinds: list[str]) -> tuple[list[Part], list[Part]]:
    """What is to stand at the marks, of each kind."""
    if isinstance(objects, str) and objects:
        objects = parsed(objects, "its `objects`")
    if objects is None or objects in ("", [], {}):
        return [], []
    if not isinstance(objects, dict):
        raise BadEntry(
            "wrong shape", f"its `objects` is {describe(objects)}, not an object of lists `ref` "
                           f"and `bbox`"
        )
    refs, boxes, images = (
        _listed(objects, key) for key in ("ref", "bbox", "image_id")
    )
    if not all(isinstance(ref, str) for ref in refs):
        raise BadEntry("wrong shape", "the `ref` of its `objects` is no list of texts")
    kind = objects.get("bbox_type") or "real"
    if kind not in ("real", "norm1"):
        raise BadEntry(
            "not served", f"the `bbox_type` of its `objects` is {describe(kind)}; boxes are read "
                          f"as real (pixels) or norm1 (parts of 1)"
        )
    if len(images) > len(boxes):
        raise BadEntry(
            "bad box", f"the `image_id` of its `objects` has {len(images)} images for "
                       f"{len(boxes)} boxes"
        )
    places = [number for number, one in enumerate(kinds) if one == IMAGE]
    made = []
    for number, box in enumerate(boxes):
        numbers, size = _numbers(box), (1, 1) if kind == "norm1" else None
        if size is not None and not places:  # nothing says which image they are parts of
            made.append(Part(box=box_of(numbers, size=size)))
            continue
        which = images[number] if number < len(images) else 0
        if isinstance(which, bool) or not isinstance(which, int) or not 0 <= which < len(places):
            raise BadEntry(
                "bad box", f"box {number} of its `objects` is in image {str(which)[:20]}, but it "
                           f"has {len(places)} images, from 0"
            )
        made.append(Part(box=box_of(numbers, size=size, image=places[which])))
    return [Part(ref=ref) for ref in refs], made


def _listed(objects: dict, key: str) -> list:
    value = objects.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadEntry("wrong shape", f"the `{key}` of its `objects` is {describe(value)}, no list")
    return value


def _numbers(box) -> list[float]:
    numbers = box if isinstance(box, list) else []
    if len(numbers) not in (2, 4, 8) or not all(
        isinstance(one, (int, float)) and not isinstance(one, bool) and abs(one) < 1e9
        and math.isfinite(one) for one in numbers
    ):
        raise BadEntry(
            "bad box", f"a `bbox` of its `objects` is {describe(str(box))}, not 2, 4 or 8 numbers"
        )
    return numbers
