"""Conversations to tokens in a form of the family's own, where no chat template makes the text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from megatron_vl.data.conversation import BadEntry, Turn
from megatron_vl.data.encode.answers import trained_turns
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.data.grounding import Pixels, render
from megatron_vl.data.options import TrainedText
from megatron_vl.models.family import Prompt
from megatron_vl.models.spec import TokenIds


class PromptTokenizer:
    """What `ChatTokenizer` is of a model with a chat template."""

    def __init__(self, prompt: Prompt, *, tokens: TokenIds, trained: TrainedText | None = None):
        self.prompt = prompt
        self.tokens = tokens
        self.trained = trained or TrainedText()

    @property
    def pad_token(self) -> int:
        return self.prompt.pad_token

    @property
    def special_ids(self) -> frozenset[int]:
        return self.prompt.special

    @property
    def end_ids(self) -> frozenset[int]:
        return self.prompt.ends

    @property
    def thinks(self) -> bool:
        return False

    def decode(self, tokens: Iterable[int]) -> str:
        return self.prompt.decode(tokens)

    def encode(
        self, turns: Sequence[Turn], media_tokens: Sequence[int], tools: str = "", *,
        pixels: Pixels | None = None, media_names: Sequence[str] = (),
        media_times: Sequence[Sequence[float]] = (), answers_alone: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels, int64 [L]: see `ChatTokenizer.encode`; no prompt writes times.

        Raises:
            BadEntry: no turn to train, an empty answer, tools, a mark of the tokenizer in it, or
                the model has no form for its objects.
        """
        trained = trained_turns(turns, self.trained)
        turns = self._checked(turns, tools, pixels)
        try:
            tokens, labels = self.prompt.encode(
                turns, trained, media_tokens, media_names, answers_alone=answers_alone
            )
        except ValueError as error:
            raise BadEntry("reserved mark", str(error)) from error
        wanted = [IGNORE if label is None else label for label in [*labels[1:], None]]
        return tuple(torch.from_numpy(np.array(one, np.int64)) for one in (tokens, wanted))

    def encode_prompt(
        self, turns: Sequence[Turn], media_tokens: Sequence[int], tools: str = "", *,
        thinking: bool | None = None, pixels: Pixels | None = None,
        media_names: Sequence[str] = (), media_times: Sequence[Sequence[float]] = (),
    ) -> torch.Tensor:
        """Tokens that an answer follows, int64 [L]: see `ChatTokenizer.encode_prompt`.

        Raises:
            BadEntry: tools, a mark of the tokenizer in it, or the model has no form for its
                objects.
        """
        turns = self._checked(turns, tools, pixels)
        try:
            return torch.tensor(self.prompt.encode_prompt(turns, media_tokens, media_names))
        except ValueError as error:
            raise BadEntry("reserved mark", str(error)) from error

    def rendered(self, turns: Sequence[Turn], pixels: Pixels | None = None) -> Sequence[Turn]:
        """See `ChatTokenizer.rendered`."""
        return render(turns, self.tokens.grounding, lambda mark: True, pixels)

    def _checked(
        self, turns: Sequence[Turn], tools: str, pixels: Pixels | None
    ) -> Sequence[Turn]:
        if tools or any(turn.of_tools for turn in turns):
            raise BadEntry(
                "chat template", "it has tools, which this model has no form for; leave such "
                "entries out"
            )
        return self.rendered(turns, pixels)
