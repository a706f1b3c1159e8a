"""Qwen-VL's own JSON, with images and boxes inside the text.

    {"conversations": [
        {"from": "user", "value": "Picture 1: <img>0.jpg</img>\\nWhere is the cat?"},
        {"from": "assistant", "value": "<ref>the cat</ref><box>(10,20),(300,400)</box>"}]}

- `<img>path</img>` is the image, and the line break after it belongs to it. Its label `Picture N: `
  stays where the entry has several images, as Qwen2-VL's chat template writes it with
  `add_vision_id`, and goes where it has one.
- `<ref>text</ref>` is what an object is called.
- `<box>(x1,y1),(x2,y2)</box>` is where it is: two corners in thousandths of the image's width and
  height. They may be broken numbers, stand on the edge (1000), or be the wrong way round.
- `<quad>`, four corners, is the same.

In a question a tag without numbers, as in `answer as <box>(x1,y1),(x2,y2)</box>`, is text.

Where no path is in the text, images and videos may be columns, as in ShareGPT's format. A `system`
column is the system prompt where no turn is.
"""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_vl.data.conversation import BadEntry, Box, Conversation, MediaSource, Part, Turn
from megatron_vl.data.raw.formats.dialogue import read_turns
from megatron_vl.data.raw.formats.fields import Fields
from megatron_vl.data.raw.formats.media_columns import (
    conversation,
    listed_media,
    media_source,
    place_media,
)
from megatron_vl.data.raw.formats.objects import box_of
from megatron_vl.data.raw.formats.turns import (
    MARK,
    describe,
    listed_turns,
    split_at_marks,
)
from megatron_vl.models.media import IMAGE

_SIZE = (1000, 1000)  # of every image, in the units of its boxes
_IMAGE = re.compile(r"(Picture [0-9]+: ?)?<img>([^<>\n]*)</img>\n?")
_IMAGE_TAG = re.compile(r"</?img>")
_TAG = re.compile(r"(</?(?:ref|box|quad)>)")
_NUMBER = r"\s*(-?[0-9]{1,6}(?:\.[0-9]{0,20})?)\s*"
_POINT = re.compile(rf"\({_NUMBER},{_NUMBER}\)")
_LIST = re.compile(rf"\s*{_POINT.pattern}(?:\s*,\s*{_POINT.pattern})*\s*")
_POINTS = {"<box>": 2, "<quad>": 4}
_TAGS = ("<ref>", *_POINTS)
_DIGITS = set("0123456789")
_OF_NUMBERS = _DIGITS | set("-.,() \t\n")
_NUMBERS_NEXT = re.compile(r"\s*\(\s*-?[0-9]")


def read(entry: dict, fields: Fields) -> Conversation:
    """The conversation of one entry.

    Raises:
        BadEntry: it is not of this format, or cannot be trained on.
    """
    turns = read_turns(listed_turns(entry, fields, "conversations", "messages"), fields, None)
    images = sum(len(_IMAGE.findall(part.text)) for turn in turns for part in turn.parts)
    made: list[Turn] = []
    media: list[MediaSource] = []
    for number, turn in enumerate(turns, start=1):
        parts: list[Part] = []
        for part in turn.parts:
            _split(part.text, number, turn.role, images > 1, parts, media)
        made.append(replace(turn, parts=tuple(parts)))
    listed = place_media((), listed_media(entry, fields))
    if not media:  # listed beside the text, as in other formats, with their marks
        made = [replace(turn, parts=_split_marks(turn.parts)) for turn in made]
    elif listed and [replace(one, settings=None) for one in listed] != media:
        raise BadEntry(
            "mark count", "its text and its columns name different media; name each in one of them"
        )
    media = listed or media  # a column may also say what is asked for each
    return conversation(made, media, entry, fields)


def _split(
    text: str, number: int, role: str, labelled: bool, parts: list[Part], media: list[MediaSource]
) -> None:
    """Add a turn's text and objects to `parts`, and the images in it to `parts` and `media`."""
    # path at every third place, the label before it, the text around them
    *pieces, last = _IMAGE.split(text)
    for said, label, path in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        parts += _grounded(said, number, role)
        if label and labelled:
            parts.append(Part(text=f"{label.rstrip()} "))
        parts.append(Part(media=IMAGE))
        media.append(media_source(path.strip(), IMAGE))
    parts += _grounded(last, number, role) or ([] if parts else [Part(text="")])


def _split_marks(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(
        piece for part in parts
        for piece in ([part] if part.text is None else split_at_marks(part.text, MARK))
    )


def _grounded(text: str, number: int, role: str) -> list[Part]:
    """A text's references and boxes as parts, in order; empty text is left out."""
    if _IMAGE_TAG.search(text):
        raise BadEntry("wrong shape", f"turn {number} has no path between <img> and </img>")
    words = _TAG.split(text)  # a tag at every second place
    parts, kept, at = [], words[0], 1
    while at < len(words):
        tag, inside = words[at], words[at + 1]
        whole = tag in _TAGS and words[at + 2 : at + 3] == [f"</{tag[1:]}"]
        if _is_quoted(tag, inside, whole, role):
            kept += tag + inside
            at += 2
            continue
        if not whole:
            raise BadEntry("bad box", f"turn {number} has a {tag} without its other half")
        made = Part(ref=inside) if tag == "<ref>" else Part(box=_box(inside, tag, number))
        parts += [*([Part(text=kept)] if kept else []), made]
        kept, at = words[at + 3], at + 4
    return [*parts, *([Part(text=kept)] if kept else [])]


def _is_quoted(tag: str, inside: str, whole: bool, role: str) -> bool:
    """Whether a tag is spoken of, in a question: it has no other half, or no numbers in it."""
    if role == "assistant" or (whole and tag == "<ref>"):
        return False
    signs = set(inside)
    return not (signs <= _OF_NUMBERS and signs & _DIGITS if whole else _NUMBERS_NEXT.match(inside))


def _box(inside: str, tag: str, number: int) -> Box:
    """Raises BadEntry: there are other numbers of points, or they are not thousandths."""
    points = _POINT.findall(inside)
    where = f"turn {number} has the {tag[1:-1]} {describe(inside)}"
    if not _LIST.fullmatch(inside) or len(points) != _POINTS[tag]:
        raise BadEntry("bad box", f"{where}, not {_POINTS[tag]} points (x,y)")
    numbers = [float(one) for point in points for one in point]
    if "." in inside and max(numbers) <= 1 and max(numbers) > 0:
        raise BadEntry(
            "bad box", f"{where}, which may be in parts of 1; write it in thousandths (0 to 1000)"
        )
    return box_of(numbers, size=_SIZE)
