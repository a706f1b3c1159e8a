"""Conversations to text, through a model's chat template; and where the text may be cut.

Rendering a template costs more than tokenising what it writes, and most of what it writes is the
same for every conversation. So a template is rendered once for conversations of one shape, with
probes for the texts; and its text is cut beside the tokenizer's own marks, so that what never
changes is tokenised once. Where either cannot be relied on, every conversation is rendered.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, pairwise
from unicodedata import category

import jinja2

from megatron_vl.data.conversation import BadEntry, Turn
from megatron_vl.data.template_rule import only_writes_texts
from megatron_vl.errors import InputError

_MAX_FORMS = 1024  # shapes of conversations remembered
_PROBE = "\n <probe>{number}</probe>\n "
_ASKED = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
# What rendering raises: Jinja, its sandbox, and what a template does with what it finds.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError,
    RecursionError,
)  # fmt: skip
# What stands at the ends of a text, as tokenizers tell apart.
_ENDS = ("ab", " ab ", "1", "'s", "\u0301", "#", "<|")

Span = tuple[int, int]  # the characters from one up to, and without, another


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Text whose tokens do not depend on what stands beside it."""

    text: str
    spans: tuple[Span, ...]  # the characters of it that are told apart: see `ChatTemplate`
    fixed: bool  # whether every conversation of this shape has it


class ChatTemplate:
    """The chat template of a fast tokenizer of transformers."""

    def __init__(self, tokenizer, *, last_answer_only: bool = False, everything: bool = False):
        """The characters told apart are those of answers that are trained.

        Args:
            last_answer_only: earlier answers are taken for prompts.
            everything: prompts are trained too; told apart are answers that are not, and what tools
                give.
        """
        self.tokenizer = tokenizer
        self.last_answer_only, self.everything = last_answer_only, everything
        self._forms: OrderedDict[tuple, _Form | object | None] = OrderedDict()
        self._stands_alone: dict[str, bool] = {}

    def render(
        self, messages: list[dict], tools: list[dict] | None = None, *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The template's text for messages and tools as transformers takes them."""
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def write(self, turns: Sequence[Turn], tools: str = "") -> list[Stretch]:
        """The conversation's text, in stretches whose tokens, joined, are those of the whole.

        Each turn of the assistant is found by rendering a conversation of this shape up to it: it
        begins where the template asks for an answer, and ends with its end token.

        Raises:
            BadEntry: the template refuses it or writes no tools, or the answer it begins with is
                not found.
            InputError: what the template writes does not grow with the conversation.
        """
        try:
            return self._write(turns, json.loads(tools) if tools else None)
        except (BadEntry, InputError):
            raise
        except _TEMPLATE_ERRORS as error:
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise BadEntry(
                "chat template", f"the model's chat template refuses it ({words[0].rstrip('.')})"
            ) from error

    def _write(self, turns: Sequence[Turn], tools: list[dict] | None) -> list[Stretch]:
        if tools or any(turn.of_tools for turn in turns):
            self._check_tools(turns, tools)
            text, spans = self._render_with_spans(turns, [t.message() for t in turns], tools)
            return [Stretch(text=text, spans=tuple(spans), fixed=False)]
        shape = tuple((t.role, t.trained, *(part.media for part in t.parts)) for t in turns)
        if shape in self._forms:
            self._forms.move_to_end(shape)
            form = self._forms[shape]
            if form is _SEEN_ONCE:
                form = self._forms[shape] = self._form(turns)
        else:
            # Long conversations are of many shapes, and a form costs several renderings.
            form, self._forms[shape] = None, _SEEN_ONCE
            if len(self._forms) > _MAX_FORMS:
                self._forms.popitem(last=False)
        if form is None:
            text, spans = self._render_with_spans(turns, [turn.message() for turn in turns])
            return [Stretch(text=text, spans=tuple(spans), fixed=False)]
        return _fill(form, (p.text for turn in turns for p in turn.parts if p.text is not None))

    def _render_with_spans(
        self, turns: Sequence[Turn], messages: list[dict], tools: list[dict] | None = None
    ) -> tuple[str, list[Span]]:
        """The text of `messages`, those of `turns`, and what is told apart in it."""
        text = self.render(messages, tools)
        spans = {}  # of every answer, by its number
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
        if self.everything:
            return text, _untrained(turns, spans, len(text))
        kept = list(spans)[-1:] if self.last_answer_only else spans
        return text, [spans[number] for number in kept if turns[number].trained]

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
        request = self.render(_ASKED, add_generation_prompt=True).removeprefix(self.render(_ASKED))
        before, found, _ = self.render(messages, tools).partition(request)
        if not request or not found:
            raise BadEntry(
                "chat template", "it begins with an answer, and where that begins cannot be found "
                "in what the model's chat template writes; begin with a question"
            )
        return before + found

    # ---- forms --------------------------------------------------------------------------------

    def _form(self, turns: Sequence[Turn]) -> _Form | None:
        """What the template writes around the texts of such turns; None if it cannot be told."""
        if not self._writes_only:
            return None
        probes, messages = [], []
        for turn in turns:
            message = turn.message()
            for content in message["content"]:
                if "text" in content:
                    probes.append(_PROBE.format(number=len(probes)))
                    content["text"] = probes[-1]
            messages.append(message)
        text, spans = self._render_with_spans(turns, messages)
        atoms = self._atoms(text, probes, spans)
        if atoms is None:
            return None
        form = _cut(atoms)
        # Marks alone do not tell: tokenizers may treat the first word of all in a way of its own.
        for said in (probes, *([end] * len(probes) for end in _ENDS)):
            stretches = _fill(form, iter(said))
            if not self._same_tokens([stretch.text for stretch in stretches]):
                return (tuple(atoms),)
        return form

    def _atoms(self, text: str, probes: list[str], spans: list[Span]) -> list[_Atom] | None:
        """The text cut at probes, answers and marks; None if a probe is not there once."""
        probed, at = [], 0
        for probe in probes:
            begin = text.find(probe, at)
            if begin < 0 or text.count(probe) > 1:
                return None
            at = begin + len(probe)
            probed.append((begin, at))
        marks = self._marks(text)
        edges = sorted({0, len(text), *chain(*probed, *spans, *marks)})
        if any(edges[bisect_right(edges, begin)] != end for begin, end in probed):
            return None
        begins = [begin for begin, _ in spans]
        atoms, places = [], set(probed)
        for begin, end in pairwise(edges):
            answer = bisect_right(begins, begin) - 1
            inside = answer >= 0 and begin < spans[answer][1]
            atoms.append(_Atom(
                text=None if (begin, end) in places else text[begin:end],
                answer=answer if inside else None, is_mark=(begin, end) in marks,
            ))
        return atoms

    def _marks(self, text: str) -> set[Span]:
        """Where the tokenizer finds marks of its own, of those beside which a text can be cut."""
        encoded = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return {
            (begin, end) for token, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True)
            if token in self._added and text[begin:end] == self._added[token].content
            and self._is_place(self._added[token])
        }

    @cached_property
    def _names(self) -> set[str]:
        """The names and texts in the template that tools are written with."""
        source = self.tokenizer.get_chat_template(tools=[{}])
        words = jinja2.Environment().lex(source)
        return {word.strip("'\"") for _, kind, word in words if kind in ("name", "string")}

    @cached_property
    def _writes_only(self) -> bool:
        return only_writes_texts(self.tokenizer.get_chat_template())

    @cached_property
    def _added(self) -> dict:
        """Tokens that the tokenizer finds before it does anything else, by their number."""
        return self.tokenizer.added_tokens_decoder

    def _is_place(self, token) -> bool:
        """Whether the tokenizer finds this mark whatever is beside it, and leaves that alone."""
        mark = token.content
        if mark not in self._stands_alone:
            alters = token.lstrip or token.rstrip or token.single_word or token.normalized
            # Other marks may ask whether they stand beside a letter, or take spaces with them.
            signs = all(category(c)[0] in "PS" and category(c) != "Pc" for c in (mark[0], mark[-1]))
            self._stands_alone[mark] = not alters and signs and not any(
                _hides(other.content, mark) for other in self._added.values()
            )
        return self._stands_alone[mark]

    def _same_tokens(self, parts: list[str]) -> bool:
        """Whether the parts' tokens, and where they are, are those of the whole text."""
        encode = self.tokenizer.backend_tokenizer.encode
        whole = encode("".join(parts), add_special_tokens=False)
        ids, offsets, at = [], [], 0
        for part in parts:
            encoded = encode(part, add_special_tokens=False)
            ids += encoded.ids
            offsets += [(begin + at, end + at) for begin, end in encoded.offsets]
            at += len(part)
        return (ids, offsets) == (whole.ids, whole.offsets)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Atom:
    """A piece of a template's text."""

    text: str | None  # None where a part's text goes
    answer: int | None  # the number of the answer it belongs to
    is_mark: bool  # a text can be cut before and after it


_Form = tuple[Stretch | tuple[_Atom, ...], ...]  # atoms where texts go among them
_SEEN_ONCE = object()


def _cut(atoms: Sequence[_Atom]) -> _Form:
    """Stretches between marks; neighbours that are fixed are one."""
    runs: list[list[_Atom]] = []  # between marks
    for is_mark, run in groupby(atoms, key=lambda atom: atom.is_mark):
        if is_mark:
            runs += [[atom] for atom in run]
        else:
            runs.append(list(run))
    form: list[Stretch | tuple[_Atom, ...]] = []
    for takes_texts, group in groupby(runs, key=lambda run: any(a.text is None for a in run)):
        if takes_texts:
            form += map(tuple, group)
        else:
            form.append(_stretch(chain(*group), iter(()), fixed=True))
    return tuple(form)


def _fill(form: _Form, texts: Iterator[str]) -> list[Stretch]:
    """The form with the texts in their places."""
    return [
        piece if isinstance(piece, Stretch) else _stretch(piece, texts, fixed=False)
        for piece in form
    ]


def _stretch(atoms: Iterable[_Atom], texts: Iterator[str], *, fixed: bool) -> Stretch:
    parts, answers, last, at = [], [], None, 0
    for atom in atoms:
        parts.append(next(texts) if atom.text is None else atom.text)
        end = at + len(parts[-1])
        if atom.answer is not None:
            begin = answers.pop()[0] if atom.answer == last else at
            answers.append((begin, end))
        last, at = atom.answer, end
    return Stretch(text="".join(parts), spans=tuple(answers), fixed=fixed)


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


def _hides(other: str, mark: str) -> bool:
    """Whether `other`, with more text, can be found in place of `mark`, or begin before it.

    Of marks that begin together a tokenizer takes the longest; else the one that begins first. A
    mark hides itself where it begins as it ends.
    """
    return (other != mark and other.startswith(mark)) or any(
        other.startswith(mark, at) or mark.startswith(other[at:]) for at in range(1, len(other))
    )
