"""Turns under a role and a content key, with marks in the text where images and videos stand."""

from __future__ import annotations

import re

from megatron_vl.data.conversation import BadEntry, Part, Turn
from megatron_vl.data.raw.formats.fields import Fields
from megatron_vl.data.raw.formats.tracked import call_keys

MARK = re.compile(r"<(image|video)>")
CALL = "call"  # the role of a turn whose text is the JSON of a function call
ROLES = {  # what roles are called, whatever the format
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": CALL,
    "tool_call": CALL,
    "observation": "tool",
    "tool_response": "tool",
    "tool": "tool",
    "function": "tool",
}


def column(entry: dict, named: str | None, *defaults: str):
    """The value of the column `named`, or else of the first of `defaults` that holds something."""
    names = defaults if named is None else (named,)
    return next((entry[name] for name in names if entry.get(name)), None)


def listed_turns(entry: dict, fields: Fields, *defaults: str) -> list:
    """The entry's list of turns, each still as it is written.

    Raises:
        BadEntry: there is none.
    """
    said = column(entry, fields.messages, *defaults)
    if not isinstance(said, list):
        name = fields.messages or "` or `".join(defaults)
        raise BadEntry("wrong shape", f"it has no list `{name}`, or an empty one")
    call_keys(said, "turn key")
    return said


def role_names(fields: Fields) -> dict[str, str]:
    """Every name of a role the dataset may use -> the role."""
    roles = dict(ROLES)
    for name, role in (
        (fields.observation_tag, "tool"),
        (fields.function_tag, CALL),
        (fields.user_tag, "user"),
        (fields.assistant_tag, "assistant"),
        (fields.system_tag, "system"),
    ):
        if name is not None:
            roles[name] = role
    return roles


def read_role(turn, number: int, fields: Fields, roles: dict[str, str]) -> tuple[str, str]:
    """The role of a turn, and the key its content is under.

    Raises:
        BadEntry: no object, or nobody known.
    """
    if not isinstance(turn, dict):
        raise BadEntry("wrong shape", f"turn {number} is {describe(turn)}, not an object")
    # A table of turns has every key in every row, empty where a row has none.
    by_role = turn.get("from") is None
    role_key = fields.role_tag or ("role" if by_role else "from")
    content_key = fields.content_tag or ("content" if by_role else "value")
    name = turn.get(role_key)
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadEntry(
            "unknown role",
            f"turn {number} is from {describe(name)}, not one of: {', '.join(roles)}",
        )
    return role, content_key


def split_at_marks(text: str, mark: re.Pattern | None) -> tuple[Part, ...]:
    """Text and media parts in order; `mark`'s group 1 is the kind. Empty text is left out."""
    parts: list[Part] = []
    done = 0
    for found in mark.finditer(text) if mark else ():
        if found.start() > done:
            parts.append(Part(text=text[done : found.start()]))
        parts.append(Part(media=found[1], mark=found[0]))
        done = found.end()
    if done < len(text) or not parts:
        parts.append(Part(text=text[done:]))
    return tuple(parts)


def with_system(turns: tuple[Turn, ...], entry: dict, fields: Fields) -> tuple[Turn, ...]:
    """The turns after the entry's system prompt; a system turn of their own comes before it.

    Raises:
        BadEntry: the system prompt is no text.
    """
    system, name = column(entry, fields.system, "system"), fields.system or "system"
    if system is None or (turns and turns[0].role == "system"):
        return turns
    if not isinstance(system, str):
        raise BadEntry("wrong shape", f"its `{name}` is {describe(system)}, not text")
    return Turn(role="system", parts=(Part(text=system),)), *turns


def describe(value) -> str:
    """A value in a message: its text if it is short, else what it is."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:60]!r}..."
    if isinstance(value, dict):
        return "an object"
    names = {list: "a list", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
