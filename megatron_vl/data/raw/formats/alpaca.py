"""Alpaca's JSON: `[{"instruction": ..., "input": ..., "output": ...}, ...]`, text as a rule.

The question is the instruction and, where there is one, the input on the next line, as in
LLaMA-Factory. `system` is the system prompt; `history`, a list of [question, answer], comes before
the question. `<image>` and `<video>` in the text are the places of the entry's `images` and
`videos`, as in ShareGPT's format. A dataset_info.json may name other columns.
"""

from __future__ import annotations

from megatron_vl.data.conversation import BadEntry, Conversation, Turn
from megatron_vl.data.raw.formats.fields import Fields
from megatron_vl.data.raw.formats.media_columns import conversation, listed_media, place_media
from megatron_vl.data.raw.formats.turns import MARK, column, describe, split_at_marks


def read(entry: dict, fields: Fields) -> Conversation:
    """The conversation of one entry.

    Raises:
        BadEntry: it is not of this format, or cannot be trained on.
    """
    media = listed_media(entry, fields)
    asked = [
        _text(entry, name)
        for name in (_name(fields.prompt, "instruction"), _name(fields.query, "input"))
        if entry.get(name)
    ]
    if not asked:
        raise BadEntry("wrong shape", f"it has no text `{fields.prompt or 'instruction'}`")
    last = "\n".join(asked), _text(entry, fields.response or "output")
    turns = tuple(
        Turn(role=role, parts=split_at_marks(text, MARK))
        for pair in (*_history(entry, fields), last)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )
    return conversation(turns, place_media(turns, media), entry, fields)


def _name(named: str | None, default: str) -> str:
    return default if named is None else named


def _text(entry: dict, name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        raise BadEntry("wrong shape", f"its `{name}` is {describe(value)}, not text")
    return value


def _history(entry: dict, fields: Fields) -> list[list[str]]:
    pairs = column(entry, fields.history, "history")
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        name = fields.history or "history"
        raise BadEntry("wrong shape", f"its `{name}` is no list of [question, answer]")
    return pairs
