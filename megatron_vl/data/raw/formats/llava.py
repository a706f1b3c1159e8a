"""LLaVA's JSON: `[{id, image, conversations: [{from, value}, ...]}, ...]`, images beside it.

LLaVA-Pretrain and LLaVA-Instruct: an entry without `image` is text. `image` is one path or a list;
`images`, `video` and `videos` are understood alike. Turns are from human (or user), gpt (or
assistant) and system; without a system turn, a `system` column is the system prompt.

`<image>` in a value marks the image's place, `<video>` a video's. The one line break between a mark
and the text beside it belongs to the mark: `"<image>\\nWhat is this?"` is the image, then `What is
this?`.
"""

from __future__ import annotations

import re

from megatron_vl.data.conversation import Conversation, Part, Turn
from megatron_vl.data.raw.formats.dialogue import read_turns
from megatron_vl.data.raw.formats.fields import Fields
from megatron_vl.data.raw.formats.media_columns import conversation, listed_media, place_media
from megatron_vl.data.raw.formats.turns import MARK, listed_turns, split_at_marks
from megatron_vl.models.media import IMAGE

_MARK_AND_BREAK = re.compile(rf"\n?{MARK.pattern}\n?")


def read(entry: dict, fields: Fields) -> Conversation:
    """The conversation of one entry.

    Raises:
        BadEntry: it is not of this format, or cannot be trained on.
    """
    said = listed_turns(entry, fields, "conversations", "messages")
    turns = read_turns(said, fields, _MARK_AND_BREAK)
    return conversation(
        turns, place_media(turns, listed_media(entry, fields)), entry, fields
    )


def split_marks(value: str) -> tuple[Part, ...]:
    """A value to text and media parts, in order; empty text is left out."""
    return split_at_marks(value, _MARK_AND_BREAK)


def question_and_answer(question: str, answer: str) -> tuple[Turn, Turn]:
    """One question on one image; without a mark the image comes first."""
    parts = split_marks(question)
    if not any(part.media for part in parts):
        parts = (Part(media=IMAGE), *parts)
    return Turn(role="user", parts=parts), Turn(role="assistant", parts=(Part(text=answer),))
