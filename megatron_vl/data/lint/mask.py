"""What of a sample is trained: its tokens as stretches of text, and the places of its media."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.prompt import PromptTokenizer
from megatron_vl.data.encode.samples import IGNORE


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownPiece:
    """Neighbouring tokens of one kind."""

    text: str = ""
    trained: bool = False  # these tokens are what the loss is about
    special: bool = False  # the tokenizer's own marks
    media: int | None = None  # the number of the image or video that stands here


def pieces(
    tokens: torch.Tensor, labels: torch.Tensor, *, chat: ChatTokenizer | PromptTokenizer,
    media_tokens: Sequence[int],
) -> Iterator[ShownPiece]:
    """The stretches of a sample, in order.

    Tokens are put together before they are written out: one character may be several of them.

    Args:
        tokens: [L], labels: [L], as a sample is encoded: a label is the next position's token.
        media_tokens: places that each image and video takes, in order.
    """
    special = chat.special_ids
    ids, is_place = tokens.tolist(), chat.tokens.places(tokens).tolist()
    trained = [False, *(label != IGNORE for label in labels.tolist()[:-1])]
    at = number = left = 0
    while at < len(ids):
        if is_place[at]:
            if not left:  # else a later frame of the same video
                yield ShownPiece(media=number)
                left, number = media_tokens[number], number + 1
            while left and at < len(ids) and is_place[at]:
                at, left = at + 1, left - 1
            continue
        kind, end = (ids[at] in special, trained[at]), at + 1
        while end < len(ids) and not is_place[end] and (
            (ids[end] in special, trained[end]) == kind
        ):
            end += 1
        yield ShownPiece(text=chat.decode(ids[at:end]), special=kind[0], trained=kind[1])
        at = end
