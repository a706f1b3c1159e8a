"""Conversations to text, through a model's chat template; and where what is trained stands in it.

An answer is found by rendering the conversation once more, with a mark in the answer's place: no
text of the template or of a person is searched for, and the conversation up to a turn need not be
the beginning of the whole. A rendering takes a quarter of a millisecond, two of them more than all
else of a dialogue with one small image. So a template that the model's family knows is not
rendered: the family writes what it would.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count

import jinja2

from megatron_vl.data.conversation import BadEntry, Part, Turn
from megatron_vl.models.family import Family, Span, TemplateWriter

_ASKED = (Turn(role="user", parts=(Part(text="a"),)),)
_NOT_FOUND = (
    "the model's chat template does not write every answer once, in a place of its own, so the "
    "answers cannot be found in its text"
)
# What rendering raises: Jinja, its sandbox, and what a template does with what it finds.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError,
    RecursionError,
)  # fmt: skip


class ChatTemplate:
    """The chat template of a fast tokenizer of transformers."""

    def __init__(self, tokenizer, *, family: Family | None = None, last_answer_only: bool = False,
                 text_only: bool = False):
        """
        Args:
            family: that may know the template; None: it is rendered.
            last_answer_only: earlier answers are taken for prompts.
            text_only: of a model without media, whose template takes contents as plain text.
        """
        self.tokenizer = tokenizer
        self.last_answer_only = last_answer_only
        self.family, self.text_only = family, text_only

    def render(
        self, messages: list[dict], tools: list[dict] | None = None, **options: bool
    ) -> str:
        """The template's text for messages, tools and options as transformers takes them."""
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    def messages(self, turns: Sequence[Turn]) -> list[dict]:
        """The turns as the template takes them."""
        return [turn.message(plain=self.text_only) for turn in turns]

    def write(
        self, turns: Sequence[Turn], tools: str = "", *, with_prompts: bool = False
    ) -> tuple[str, list[Span]]:
        """The conversation's text, and the characters of it that are told apart, in order: those
        of answers that are trained.

        An answer begins behind what the template itself writes before it, and ends with its end
        token. A template may write an empty reasoning there, as after a generation prompt without
        thinking; where the answer brings reasoning instead, the reasoning is part of it.

        Args:
            with_prompts: prompts are trained too; told apart are answers that are not, and what
                tools give.

        Raises:
            BadEntry: the template refuses it or writes no tools, or an answer is not found.
        """
        with _refusals():
            functions = json.loads(tools) if tools else None
            self._check_tools(turns, functions)
            if self._writer is not None:
                text, spans = self._writer(turns)
            else:
                text, spans = self._render_with_spans(turns, functions)
        if with_prompts:
            return text, _untrained(turns, spans, len(text))
        kept = list(spans)[-1:] if self.last_answer_only else spans
        return text, [spans[number] for number in kept if turns[number].trained]

    def prompt(
        self, turns: Sequence[Turn], tools: str = "", *, thinking: bool | None = None
    ) -> str:
        """The text that the answer to the last turn follows.

        Args:
            thinking: whether reasoning is to precede the answer; None: the template's default.
                Without, the prompt ends as before a trained answer that brings none.

        Raises:
            BadEntry: the template refuses it, or writes no tools.
        """
        with _refusals():
            functions = json.loads(tools) if tools else None
            self._check_tools(turns, functions)
            asked = {} if thinking is None else {"enable_thinking": True}
            text = self.render(
                self.messages(turns), functions, add_generation_prompt=True, **asked
            )
            return text + self._around[0] if thinking is False else text

    @property
    def closing(self) -> str:
        """What the template writes behind an answer: its end token."""
        return self._around[1]

    @property
    def thinks(self) -> bool:
        """Whether it can be asked for an answer with or without reasoning."""
        return "enable_thinking" in self._names or bool(self._around[0])

    def _render_with_spans(
        self, turns: Sequence[Turn], tools: list[dict] | None
    ) -> tuple[str, dict[int, Span]]:
        """The rendered text, and where every answer is, by the number of its turn."""
        messages = self.messages(turns)
        text = self.render(messages, tools)
        mark = _unused(text)
        spans = {}
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            marked = [*messages[:number], self._answer(mark), *messages[number + 1 :]]
            begin, end = self._place(text, self.render(marked, tools), mark)
            if turn.says and not text[begin:end].strip():
                raise BadEntry(
                    "chat template", f"the model's chat template leaves out all that the answer in "
                    f"turn {number + 1} says"
                )
            spans[number] = begin, end + len(self._around[1])
        return text, spans

    def _place(self, text: str, marked: str, mark: str) -> Span:
        """Where one answer is in a text, without its end token; `marked` has a mark there.

        Raises:
            BadEntry: the texts differ elsewhere too.
        """
        before, _, after = marked.partition(mark)
        own, closing = self._around
        if not text.startswith(before):  # the answer brings what the template would write for it
            before = before.removesuffix(own)
        begin, end = len(before), len(text) - len(after)
        if not (marked.count(mark) == 1 and begin <= end and text.startswith(before)
                and text.endswith(after) and after.startswith(closing)):
            raise BadEntry("chat template", _NOT_FOUND)
        return begin, end

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What the template writes from a generation prompt to an answer, and behind the answer."""
        asked = self.messages(_ASKED)
        # Some templates write an empty reasoning into the prompt unless they are asked to think.
        prompt = self.render(asked, add_generation_prompt=True, enable_thinking=True)
        mark = _unused(prompt)
        before, found, after = self.render([*asked, self._answer(mark)]).partition(mark)
        if not found:
            raise BadEntry("chat template", _NOT_FOUND)
        return before.removeprefix(prompt) if before.startswith(prompt) else "", after.rstrip()

    def _answer(self, text: str) -> dict:
        return self.messages([Turn(role="assistant", parts=(Part(text=text),))])[0]

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


@contextmanager
def _refusals() -> Iterator[None]:
    """What a template raises, as BadEntry."""
    try:
        yield
    except BadEntry:
        raise
    except _TEMPLATE_ERRORS as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise BadEntry(
            "chat template", f"the model's chat template refuses it ({words[0].rstrip('.')})"
        ) from error


def _unused(text: str) -> str:
    """A word that is not in a text."""
    return next(word for number in count() if (word := f"answer{number}") not in text)


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
