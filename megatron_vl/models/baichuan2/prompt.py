"""Baichuan2's form of a conversation, as its own fine-tuning and its chat have it.

    system <reserved_106> question <reserved_107> answer <reserved_106> question .. answer </s>

Every text is encoded by itself, as it is: no blank, line break or <s> is put between. An answer has
no end token in the input but the last, yet its end is trained: where a question begins, </s> is the
label. So a position's label is not always its token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from megatron_vl.models.baichuan2.tokenizer import ASSISTANT, EOS, MARKS, USER, load_pieces
from megatron_vl.models.family import Said
from megatron_vl.models.spec import ModelSpec

BEGINS = {"user": USER, "assistant": ASSISTANT}  # a system prompt has no mark


class ReservedPrompt:
    """`megatron_vl.models.family.Prompt`, with the reserved tokens 195 and 196."""

    special = frozenset(MARKS)
    ends = frozenset({EOS})

    def __init__(self, pieces, pad_token: int):
        self.pieces = pieces
        self.pad_token = pad_token

    def encode(
        self, turns: Sequence[Said], trained: Sequence[bool], media_tokens: Sequence[int] = (),
        media_names: Sequence[str] = (), *, answers_alone: bool = False,
    ) -> tuple[list[int], list[int | None]]:
        """See `megatron_vl.models.family.Prompt`."""
        tokens: list[int] = []
        labels: list[int | None] = []
        before: tuple[str, bool] | None = None  # role of the turn before, whether it is trained

        def label_of_mark(role: str) -> int | None:
            if answers_alone and before != ("assistant", True):
                return None
            return _label_of_mark(role, before)

        for number, (turn, is_trained) in enumerate(zip(turns, trained, strict=True), start=1):
            text = self._text(turn, number)
            is_trained &= turn.role == "assistant" or not answers_alone
            if turn.role in BEGINS:
                tokens.append(BEGINS[turn.role])
                labels.append(label_of_mark(turn.role))
            tokens += text
            labels += text if is_trained else [None] * len(text)
            before = turn.role, is_trained
        return [*tokens, EOS], [*labels, label_of_mark("user")]

    def encode_prompt(
        self, turns: Sequence[Said], media_tokens: Sequence[int] = (),
        media_names: Sequence[str] = (),
    ) -> list[int]:
        """See `megatron_vl.models.family.Prompt`."""
        (*asked, _), _ = self.encode(turns, [False] * len(turns))
        return [*asked, ASSISTANT]

    def _text(self, turn: Said, number: int) -> list[int]:
        text = self.pieces.encode("".join(part.text or "" for part in turn.parts))
        if marks := self.special.intersection(text) - {0}:
            raise ValueError(f"turn {number} holds the reserved mark {MARKS[min(marks)]}")
        return text

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, marks as they are written; an id behind the last is U+FFFD."""
        runs = groupby(tokens, key=lambda token: token < len(self.pieces))
        return "".join(self.pieces.decode(list(run)) if known else "\ufffd" * len(list(run))
                       for known, run in runs)


def _label_of_mark(role: str, before: tuple[str, bool] | None) -> int | None:
    """What is to be predicted where a turn begins, after the turn `before`."""
    if before is None or before == ("assistant", False):
        return None
    if role == "user":  # of two questions the first is trained to end as well
        return None if before[0] == "system" else EOS
    return ASSISTANT if before in (("user", True), ("system", True)) else None


def prompt(hf_dir: Path, spec: ModelSpec) -> ReservedPrompt:
    """Of a directory.

    Raises:
        InputError: its tokenizer.model cannot be used.
    """
    pieces = load_pieces(hf_dir, spec.decoder.vocab_size)
    return ReservedPrompt(pieces, 0 if spec.tokens.pad is None else spec.tokens.pad)
