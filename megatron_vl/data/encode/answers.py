"""Which turns of a conversation are trained, and whether it can be trained on at all."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.data.conversation import BadEntry, Turn
from megatron_vl.data.options import TrainedText


def trained_turns(turns: Sequence[Turn], trained: TrainedText) -> list[bool]:
    """Of each turn whether it is trained.

    Raises:
        BadEntry: an answer is empty, or none is to be trained.
    """
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not all(turn.says for turn in answers):
        raise BadEntry("empty answer", "its answer is empty")
    last = answers[-1:] if trained.mask_history else answers
    if not any(turn.trained for turn in last):
        raise BadEntry(
            "no answer",
            "it has no answer to train on" if last == answers else
            "its last answer, which mask-history alone trains, is not to be trained (loss "
            "false, weight 0)",
        )
    return [
        turn.trained and any(turn is one for one in last) if turn.role == "assistant"
        else trained.train_on_prompt and turn.role != "tool"
        for turn in turns
    ]
