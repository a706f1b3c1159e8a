"""Functions that a conversation may call, the calls, and what comes back.

| | |
|---|---|
| `tools` beside the turns | a list of functions, `{"name", "description", "parameters"}` or OpenAI's `{"type": "function", "function": ...}`, or its JSON |
| a turn of `function_call` (LLaMA-Factory) or `tool_call` (ms-swift) | its text is the JSON of `{"name", "arguments"}`, or of a list of them |
| an answer with `tool_calls`, or `function_call` (OpenAI) | a list of `{"id", "function": {"name", "arguments"}}`, or one |
| a turn of `observation`, `tool_response`, `tool` or `function` | what a function gives |

A call that follows an answer is part of it, and calls that follow one another are one answer.
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from megatron_vl.data.conversation import BadEntry, Call, Turn
from megatron_vl.data.raw.formats.fields import Fields
from megatron_vl.data.raw.formats.turns import column, describe
from megatron_vl.inputs import json_value


def read_tools(entry: dict, fields: Fields) -> str:
    """The JSON list of an entry's functions, as chat templates take them; "" if it has none.

    Raises:
        BadEntry: something else.
    """
    name = fields.tools or "tools"
    value = column(entry, fields.tools, "tools")
    if value is None:
        return ""
    value = parsed(value, f"its `{name}`")
    tools = [parsed(one, f"its `{name}`") for one in value if one is not None] if (
        isinstance(value, list)) else [value]
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadEntry(
                "wrong shape", f"its `{name}` is no list of functions, each with a `name`"
            )
    wrapped = [one if "function" in one else {"type": "function", "function": one} for one in tools]
    return json.dumps(wrapped, ensure_ascii=False) if wrapped else ""


def read_calls(value, number: int) -> tuple[Call, ...]:
    """The calls of one turn.

    Raises:
        BadEntry: something else.
    """
    value = parsed(value, f"the call in turn {number}")
    calls = []
    for said in value if isinstance(value, list) else [value]:
        said = parsed(said, f"the call in turn {number}")
        named = said if isinstance(said, dict) else {}
        function = named.get("function") or named
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise BadEntry("wrong shape", f"turn {number} calls a function without a `name`")
        arguments = function.get("arguments")
        arguments = {} if arguments in (None, "") else parsed(
            arguments, f"the `arguments` of {describe(name)} in turn {number}"
        )
        if not isinstance(arguments, dict):
            raise BadEntry(
                "wrong shape", f"the `arguments` of {describe(name)} in turn {number} are "
                               f"{describe(arguments)}, not an object"
            )
        own = named.get("id")
        calls.append(Call(
            name=name, arguments=json.dumps(arguments, ensure_ascii=False),
            id=own if isinstance(own, str) and own else None,
        ))
    if not calls:
        raise BadEntry("wrong shape", f"turn {number} calls no function")
    return tuple(calls)


def calls_of(turn: dict, number: int) -> tuple[Call, ...]:
    """The calls beside an answer's content. Raises BadEntry: see `read_calls`."""
    if not ("tool_calls" in turn or "function_call" in turn):
        return ()
    value = turn.get("tool_calls") or turn.get("function_call")
    return read_calls(value, number) if value else ()


def join_calls(turns: Iterable[Turn], first: int = 1) -> tuple[Turn, ...]:
    """The turns with each call in the answer before it. `first`: the number of the first turn.

    Raises:
        BadEntry: of the two one is trained and the other is not.
    """
    made: list[Turn] = []
    for number, turn in enumerate(turns, start=first):
        before = made[-1] if made else None
        if before is None or before.role != "assistant" or not turn.calls or turn.parts:
            made.append(turn)
            continue
        if turn.trained != before.trained:
            raise BadEntry(
                "not served", f"turn {number} is a call that belongs to the answer before it, but "
                              f"only one of them is to be trained; give both the same"
            )
        made[-1] = replace(before, calls=before.calls + turn.calls)
    return tuple(made)


def parsed(value, what: str):
    """Plain values: JSON is read, and an object is as it was before anything was noted of it."""
    try:
        read = json_value(value if isinstance(value, str) else json.dumps(value))
        json.dumps(read, allow_nan=False)  # NaN is no JSON
        return read
    except (ValueError, TypeError, RecursionError) as error:
        raise BadEntry("wrong shape", f"{what} is not valid JSON ({str(error)[:100]})") from error
