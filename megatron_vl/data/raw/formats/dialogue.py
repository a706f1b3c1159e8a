"""Turns as they are written, to turns: who speaks, what is said or called, and what is trained."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_vl.data.conversation import BadEntry, Part, Turn
from megatron_vl.data.raw.formats.fields import Fields
from megatron_vl.data.raw.formats.loss import is_trained
from megatron_vl.data.raw.formats.tools import calls_of, read_calls
from megatron_vl.data.raw.formats.turns import CALL, read_role, role_names, split_at_marks


def read_turns(said: Sequence, fields: Fields, mark: re.Pattern | None) -> tuple[Turn, ...]:
    """The turns of `[{role, content}, ...]`, their texts split at each `mark` (None: not at all).

    The keys are `from` and `value`, or `role` and `content`, unless the tags name others.

    Raises:
        BadEntry: a turn that is no object, from nobody known, without text or call, or with a loss
            that is not served.
    """
    roles = role_names(fields)
    turns = []
    for number, turn in enumerate(said, start=1):
        role, key = read_role(turn, number, fields, roles)
        text = turn.get(key)
        if not isinstance(text, str) and not (text is None and calls_of(turn, number)):
            raise BadEntry("wrong shape", f"turn {number} has no text `{key}`")
        turns.append(make_turn(turn, role, number, text or "", split_at_marks(text or "", mark)))
    return tuple(turns)


def make_turn(turn: dict, role: str, number: int, text, parts: tuple[Part, ...]) -> Turn:
    """A turn of what it says and of the keys beside that.

    Args:
        role: one of ROLES, or CALL.
        text: as it is written; the JSON of a call.
        parts: of `text`, if it is no call.

    Raises:
        BadEntry: a call or a loss that cannot be read.
    """
    if role == CALL:
        calls, role, parts = read_calls(text, number), "assistant", ()
    elif role == "assistant":
        calls = calls_of(turn, number)
        parts = () if calls and parts == (Part(text=""),) else parts
    elif calls_of(turn, number):
        raise BadEntry(
            "not served", f"turn {number} of {role} calls a function; calls are answers'"
        )
    else:
        calls = ()
    trained = is_trained(turn, role, number)
    call_id = turn.get("tool_call_id") if role == "tool" else None
    return Turn(
        role=role, parts=parts, calls=calls, trained=trained or role != "assistant",
        call_id=call_id if isinstance(call_id, str) and call_id else None,
    )
