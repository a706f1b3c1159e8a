"""ShareGPT's JSON as LLaMA-Factory reads it, with images and videos.

    {"messages": [{"role": "user", "content": "<image>What is this?"}, ...], "images": ["0.jpg"]}

The turns are `messages` or `conversations`, of `from` human, gpt, system and `value`, or of `role`
user, assistant, system and `content`, unless a dataset_info.json names others. `<image>` and
`<video>` take the entry's `images` and `videos` in turn. The text around a mark stays exactly as it
is: LLaMA-Factory puts the image's tokens where the mark was. A system turn, or else the `system`
column, is the system prompt. Calls of tools and what they give are read as `tools` says.
"""

from __future__ import annotations

from megatron_vl.data.conversation import Conversation
from megatron_vl.data.raw.formats.dialogue import read_turns
from megatron_vl.data.raw.formats.fields import Fields
from megatron_vl.data.raw.formats.media_columns import conversation, listed_media, place_media
from megatron_vl.data.raw.formats.turns import MARK, listed_turns


def read(entry: dict, fields: Fields) -> Conversation:
    """The conversation of one entry.

    Raises:
        BadEntry: it is not of this format, or cannot be trained on.
    """
    said = listed_turns(entry, fields, "messages", "conversations")
    turns = read_turns(said, fields, MARK)
    return conversation(
        turns, place_media(turns, listed_media(entry, fields)), entry, fields
    )
