"""Tokens that a model predicts as text: what it answers, beside what it is to answer."""

from __future__ import annotations

from itertools import pairwise

from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.prompt import PromptTokenizer
from megatron_vl.training.reporting.validation import Answer
from megatron_vl.training.scores import Predicted


def answer_of(one: Predicted, chat: ChatTokenizer | PromptTokenizer) -> Answer:
    """The answers of a sample as text, a line each.

    The mark behind an answer is left out where it is predicted; any other stands as it is written.
    """
    likeliest = one.likeliest.tolist()
    cuts = [0, *(at for at, (a, b) in enumerate(pairwise(one.places), 1) if b != a + 1),
            len(one.places)]
    expected, answered = [], []
    for begin, end in pairwise(cuts):
        wanted, said = one.expected[begin:end], likeliest[begin:end]
        if wanted and wanted[-1] == said[-1] and wanted[-1] in chat.special_ids:
            wanted, said = wanted[:-1], said[:-1]
        expected.append(chat.decode(wanted))
        answered.append(chat.decode(said))
    return Answer(
        preview=one.preview, expected="\n".join(expected), answer="\n".join(answered),
        exact=bool(likeliest) and one.expected == likeliest,
    )
