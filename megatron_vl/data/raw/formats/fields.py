"""The names a dataset gives its columns, keys and roles, as in LLaMA-Factory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """Columns of an entry, and tags of its turns; None where the format's own default applies.

    A column that is not to be read is "".

    They are the `columns` and `tags` of dataset_info.json, with LLaMA-Factory's defaults beside.
    Formats understand more than these without being told: a module's docstring says what.
    """

    # Columns, by what they hold.
    prompt: str | None = None  # alpaca's question: "instruction"
    query: str | None = None  # what follows the question: "input"
    response: str | None = None  # alpaca's answer: "output"
    history: str | None = None  # earlier pairs of question and answer
    system: str | None = None  # the system prompt
    messages: str | None = None  # the turns: "conversations"
    images: str | None = None
    videos: str | None = None
    tools: str | None = None  # the functions that may be called

    # Tags: the keys of a turn, and the names of its roles.
    role_tag: str | None = None  # the key of the role: "from"
    content_tag: str | None = None  # the key of the text: "value"
    user_tag: str | None = None  # the user's role: "human"
    assistant_tag: str | None = None  # the model's role: "gpt"
    system_tag: str | None = None  # the system's role: "system"
    observation_tag: str | None = None  # what a tool gives: "observation"
    function_tag: str | None = None  # a call of a tool: "function_call"
