"""LLaVA's JSON: `[{id, image, conversations: [{from, value}, ...]}, ...]`, images beside it.

`<image>` in a value marks the image's place. The one line break between a mark and the text beside
it belongs to the mark: `"<image>\\nWhat is this?"` is the image, then `What is this?`.
"""

from __future__ import annotations

import json
import re

from megatron_vl.data.samples import Part, Turn

IMAGE_MARK = "<image>"
_MARK = re.compile(rf"\n?{re.escape(IMAGE_MARK)}$|{re.escape(IMAGE_MARK)}\n?")
# A tokenizer takes these for images and videos wherever they stand.
_RESERVED = re.compile(r"<\|(?:vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class BadEntry(ValueError):
    """An entry that cannot be used; the message says why, the caller says which."""


def split_marks(value: str) -> tuple[Part, ...]:
    """A value to text and image parts, in order; empty text is left out."""
    parts: list[Part] = []
    done = 0
    for mark in _MARK.finditer(value):
        if mark.start() > done:
            parts.append(Part(text=value[done : mark.start()]))
        parts.append(Part())
        done = mark.end()
    if done < len(value) or not parts:
        parts.append(Part(text=value[done:]))
    return tuple(parts)


def question_and_answer(question: str, answer: str) -> tuple[Turn, Turn]:
    """One question on one image; without a mark the image comes first."""
    parts = split_marks(question)
    if not any(part.text is None for part in parts):
        parts = (Part(), *parts)
    return Turn(role="user", parts=parts), Turn(role="assistant", parts=(Part(text=answer),))


def read_turns(entry: dict) -> tuple[Turn, ...]:
    """The turns of one entry.

    Raises:
        BadEntry: the entry is not LLaVA's shape; the message says how, the caller which entry.
    """
    conversations = entry.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise BadEntry("it has no list `conversations`, or an empty one")
    try:
        json.dumps(conversations, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadEntry(
            f"its text holds half a character (\\u{ord(error.object[error.start]):x}), which UTF-8 "
            f"cannot write"
        ) from error
    turns = []
    for number, said in enumerate(conversations, start=1):
        if not isinstance(said, dict) or not isinstance(said.get("value"), str):
            raise BadEntry(f"turn {number} has no text `value`")
        reserved = _RESERVED.search(said["value"])
        if reserved is not None:
            raise BadEntry(f"turn {number} holds the reserved mark {reserved[0]}")
        role = _ROLES.get(said["from"]) if isinstance(said.get("from"), str) else None
        if role is None:
            raise BadEntry(f"turn {number} is from {said.get('from')!r}, not human, gpt or system")
        turns.append(Turn(role=role, parts=split_marks(said["value"])))
    return tuple(turns)


def check_question_and_answer(entry: dict) -> None:
    """Whether an entry is one question about one image and its answer.

    Raises:
        BadEntry: it is not; the message says why.
    """
    turns = read_turns(entry)
    if not isinstance(entry.get("image"), str) or not entry["image"]:
        raise BadEntry("it has no `image`")
    roles = [turn.role for turn in turns]
    if roles != ["user", "assistant"]:
        raise BadEntry(f"its turns are {', '.join(roles)}, not one question and one answer")
    marks = sum(turn.num_images for turn in turns)
    if marks != 1 or turns[1].num_images:
        raise BadEntry(f"it has {marks} {IMAGE_MARK} marks, not one in the question")
    if not turns[1].parts[0].text.strip():
        raise BadEntry("its answer is empty")
