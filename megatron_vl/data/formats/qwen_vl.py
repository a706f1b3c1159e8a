"""Qwen-VL's own JSON, with images and boxes inside the text.

    {"conversations": [
        {"from": "user", "value": "Picture 1: <img>0.jpg</img>\\nWhere is the cat?"},
        {"from": "assistant", "value": "<ref>the cat</ref><box>(10,20),(300,400)</box>"}]}

It becomes what Qwen2-VL is trained on (arXiv 2409.12191, section 2.2.1):

- `<img>path</img>` is the image, and the line break after it belongs to it. Its label `Picture N: `
  stays where the entry has several images, as Qwen2-VL's chat template writes it with
  `add_vision_id`, and goes where it has one.
- `<ref>text</ref>` is `<|object_ref_start|>text<|object_ref_end|>`.
- `<box>(x1,y1),(x2,y2)</box>` is `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`: the upper left corner
  and the lower right one in thousandths of the image's width and height, 0 to 999, in both.
- `<quad>`, four corners, is `<|quad_start|>...<|quad_end|>` in the same way.

Where no path is in the text, images and videos may be columns, as in ShareGPT's format. A `system`
column is the system prompt where no turn is.
"""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_vl.data.conversation import IMAGE, BadEntry, Conversation, MediaSource, Part, Turn
from megatron_vl.data.formats.fields import Fields
from megatron_vl.data.formats.media_columns import (
    conversation,
    listed_media,
    media_source,
    place_media,
)
from megatron_vl.data.formats.turns import (
    MARK,
    describe,
    listed_turns,
    read_turns,
    split_at_marks,
    with_system,
)

_SCALE = 1000  # coordinates are below it
_IMAGE = re.compile(r"(Picture [0-9]+: ?)?<img>([^<>\n]*)</img>\n?")
_IMAGE_TAG = re.compile(r"</?img>")
_TAG = re.compile(r"(</?(?:ref|box|quad)>)")
_POINT = re.compile(r"\(\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\)")
_LIST = re.compile(rf"\s*{_POINT.pattern}(?:\s*,\s*{_POINT.pattern})*\s*")
_POINTS = {"<box>": 2, "<quad>": 4}
_TOKENS = {
    name: (f"<|{token}_start|>", f"<|{token}_end|>")
    for name, token in (("<ref>", "object_ref"), ("<box>", "box"), ("<quad>", "quad"))
}


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
            _split(part.text, number, images > 1, parts, media)
        made.append(replace(turn, parts=tuple(parts)))
    listed = place_media((), listed_media(entry, fields))
    if not media:  # listed beside the text, as in other formats, with their marks
        media = listed
        made = [replace(turn, parts=_split_marks(turn.parts)) for turn in made]
    elif listed and listed != tuple(media):
        raise BadEntry(
            "mark count", "its text and its columns name different media; name each in one of them"
        )
    return conversation(with_system(tuple(made), entry, fields), media)


def _split(
    text: str, number: int, labelled: bool, parts: list[Part], media: list[MediaSource]
) -> None:
    """Add a turn's text to `parts`, and the images in it to `parts` and `media`."""
    # path at every third place, the label before it, the text around them
    *pieces, last = _IMAGE.split(text)
    for said, label, path in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        kept = f"{label.rstrip()} " if label and labelled else ""
        before = _grounded(said, number) + kept
        if before:
            parts.append(Part(text=before))
        parts.append(Part(media=IMAGE))
        media.append(media_source(path.strip(), IMAGE))
    if last or not parts:
        parts.append(Part(text=_grounded(last, number)))


def _split_marks(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(piece for part in parts for piece in split_at_marks(part.text, MARK))


def _grounded(text: str, number: int) -> str:
    """A text with Qwen2-VL's tokens for its references and boxes."""
    if _IMAGE_TAG.search(text):
        raise BadEntry("wrong shape", f"turn {number} has no path between <img> and </img>")
    out, *rest = _TAG.split(text)
    for at in range(0, len(rest), 4):
        # tag, what stands in it, its end, the text after it; two of them where the end is missing
        tag, inside, end, after = (*rest[at : at + 4], "", "")[:4]
        if tag not in _TOKENS or end != f"</{tag[1:]}":
            raise BadEntry("bad box", f"turn {number} has a {tag} without its other half")
        if tag in _POINTS:
            inside = _points(inside, tag, number)
        begin, stop = _TOKENS[tag]
        out += f"{begin}{inside}{stop}{after}"
    return out


def _points(inside: str, tag: str, number: int) -> str:
    """Checked points as Qwen2-VL writes them: `(x1,y1),(x2,y2)`."""
    points = [(int(x), int(y)) for x, y in _POINT.findall(inside)]
    where = f"turn {number} has the {tag[1:-1]} {describe(inside)}"
    if not _LIST.fullmatch(inside) or len(points) != _POINTS[tag]:
        raise BadEntry("bad box", f"{where}, not {_POINTS[tag]} points (x,y)")
    if any(x >= _SCALE or y >= _SCALE for x, y in points):
        raise BadEntry("bad box", f"{where}, which is not within 0 and {_SCALE - 1}")
    if tag == "<box>" and (points[0][0] > points[1][0] or points[0][1] > points[1][1]):
        raise BadEntry("bad box", f"{where}, whose first corner is not the upper left one")
    return ",".join(f"({x},{y})" for x, y in points)
