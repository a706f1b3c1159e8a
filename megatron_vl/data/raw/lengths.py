"""How long a conversation is in the tokens of a model, before any shard is written."""

from __future__ import annotations

from pathlib import Path

from megatron_vl.data.conversation import BadEntry, StoredMedia, Turn
from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.media import BadMedia
from megatron_vl.data.encode.pixels import MediaProcessor
from megatron_vl.models.spec import VLMSpec


class LengthCounter:
    """Counts as training does: the model's tokenizer, its chat template, its media's sizes."""

    def __init__(self, chat: ChatTokenizer, media: MediaProcessor):
        self.chat, self.media = chat, media

    @classmethod
    def from_hf_dir(cls, hf_dir: Path, spec: VLMSpec) -> LengthCounter:
        """Raises InputError: see `ChatTokenizer.from_hf_dir` and `MediaProcessor.from_hf_dir`."""
        return cls(
            ChatTokenizer.from_hf_dir(hf_dir, tokens=spec.tokens),
            MediaProcessor.from_hf_dir(hf_dir, vision=spec.vision),
        )

    def num_tokens(
        self, turns: tuple[Turn, ...], media: tuple[StoredMedia, ...], tools: str = ""
    ) -> int:
        """Tokens of one conversation.

        Raises:
            BadEntry: it cannot be encoded.
        """
        try:
            grids = [self.media.grid(one) for one in media]
            tokens, _ = self.chat.encode(
                turns, [self.media.num_tokens(grid) for grid in grids], tools
            )
        except BadMedia as error:
            raise BadEntry("unusable media", str(error)) from error
        return tokens.numel()
