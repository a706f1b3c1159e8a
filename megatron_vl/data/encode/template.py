"""Conversations to text, through a model's chat template; and where what is trained stands in it.

Finding answers takes two renderings each, a quarter of a millisecond a rendering: more than all
else of a dialogue with one small image. So a template that the model's family knows is not
rendered: the family writes what it would.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property

import jinja2

from megatron_vl.data.conversation import BadEntry, Part, Turn
from megatron_vl.errors import InputError
from megatron_vl.models.family import Family, Span, TemplateWriter

_ASKED = (Turn(role="user", parts=(Part(text="a"),)),)
# What rendering raises: Jinja, its sandbox, and what a template does with what it finds.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError,
    RecursionError,
)  # fmt: skip


class ChatTemplate:
    """The chat template of a fast tokenizer of transformers."""

    def __init__(self, tokenizer, *, family: Family | None = None, last_answer_only: bool = False,
                 everything: bool = False, text_only: bool = False):
        """The characters told apart are those of answers that are trained.

        Args:
            family: that may know the template; None: it is rendered.
            last_answer_only: earlier answers are taken for prompts.
            everything: prompts are trained too; told apart are answers that are not, and what tools
                give.
            text_only: of a model without media, whose template takes contents as plain text.
        """
        self.tokenizer = tokenizer
        self.last_answer_only, self.everything = last_answer_only, everything
        self.family, self.text_only = family, text_only

    def render(
        self, messages: list[dict], tools: list[dict] | None = None, *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The template's text for messages and tools as transformers takes them."""
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def messages(self, turns: Sequence[Turn]) -> list[dict]:
        """The turns as the template takes them."""
        return [turn.message(plain=self.text_only) for turn in turns]

    def write(self, turns: Sequence[Turn], tools: str = "") -> tuple[str, list[Span]]:
        """The conversation's text, and the characters of it that are told apart, in order.

        Each turn of the assistant is found by rendering the conversation up to it: it begins where
        the template asks for an answer, and ends with its end token.

        Raises:
            BadEntry: the template refuses it or writes no tools, or the answer it begins with is
                not found.
            InputError: what the template writes does not grow with the conversation.
        """
        try:
            functions = json.loads(tools) if tools else None
            self._check_tools(turns, functions)
            if self._writer is not None:
                text, spans = self._writer(turns)
            else:
                text, spans = self._render_with_spans(turns, functions)
        except (BadEntry, InputError):
            raise
        except _TEMPLATE_ERRORS as error:
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise BadEntry(
                "chat template", f"the model's chat template refuses it ({words[0].rstrip('.')})"
            ) from error
        if self.everything:
            return text, _untrained(turns, spans, len(text))
        kept = list(spans)[-1:] if self.last_answer_only else spans
        return text, [spans[number] for number in kept if turns[number].trained]

    def _render_with_spans(
        self, turns: Sequence[Turn], tools: list[dict] | None
    ) -> tuple[str, dict[int, Span]]:
        """The rendered text, and where every answer is, by the number of its turn."""
        messages = self.messages(turns)
        text = self.render(messages, tools)
        spans = {}
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._prompt(messages[: number + 1], tools)
            last = number + 1 == len(messages)
            turn = text if last else self.render(messages[: number + 1], tools)
            if not (turn.startswith(prompt) and text.startswith(turn)):
                raise InputError(
                    "the model's chat template does not write a conversation turn after turn, so "
                    "the answers cannot be found in it; use a template whose text only grows."
                )
            spans[number] = len(prompt), len(turn.rstrip())
        return text, spans

    def _check_tools(self, turns: Sequence[Turn], tools: list[dict] | None) -> None:
        """Raises BadEntry: the template would leave out the functions, a call or what it gives."""
        for name, there in (
            ("tools", tools), ("tool_calls", any(turn.calls for turn in turns)),
            ("tool", any(turn.role == "tool" for turn in turns)),
        ):
            if there and name not in self._names:
                raise BadEntry(
                    "chat template",
                    f"it has tools, but the model's chat template has no `{name}`; take a model "
                    f"whose template has, or leave such entries out",
                )

    def _prompt(self, messages: list[dict], tools: list[dict] | None) -> str:
        """The text before the answer that comes last."""
        if len(messages) > 1:
            return self.render(messages[:-1], tools, add_generation_prompt=True)
        # transformers renders no empty conversation; a template may write a system turn of its own.
        asked = self.messages(_ASKED)
        request = self.render(asked, add_generation_prompt=True).removeprefix(self.render(asked))
        text = self.render(messages, tools)
        if not request or request not in text:
            raise BadEntry(
                "chat template", "it begins with an answer, and where that begins cannot be found "
                "in what the model's chat template writes; begin with a question"
            )
        return text[: text.index(request) + len(request)]

    @cached_property
    def _writer(self) -> TemplateWriter | None:
        source = self.tokenizer.get_chat_template()
        return None if self.family is None else self.family.template_writer(source)

    @cached_property
    def _names(self) -> set[str]:
        """The names and texts in the template that tools are written with."""
        source = self.tokenizer.get_chat_template(tools=[{}])
        words = jinja2.Environment().lex(source)
        return {word.strip("'\"") for _, kind, word in words if kind in ("name", "string")}


def _untrained(turns: Sequence[Turn], spans: dict[int, Span], length: int) -> list[Span]:
    """Answers that are not trained, and what stands between answers where a tool has its turn."""
    found = set()
    for number, turn in enumerate(turns):
        if turn.role == "tool":
            before = max((end for at, (_, end) in spans.items() if at < number), default=0)
            after = min((begin for at, (begin, _) in spans.items() if at > number), default=length)
            found.add((before, after))
        elif number in spans and not turn.trained:
            found.add(spans[number])
    return sorted(found)
