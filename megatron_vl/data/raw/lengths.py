"""How long a conversation is in the tokens of a model, before any shard is written."""

from __future__ import annotations

from pathlib import Path

from megatron_vl.data.conversation import BadEntry, Turn
from megatron_vl.data.encode.model import ModelEncoder
from megatron_vl.models.family import Family
from megatron_vl.models.media import BadMedia, StoredMedia
from megatron_vl.models.spec import ModelSpec


class LengthCounter:
    """Counts as training does: the model's tokenizer, its chat template, its media's sizes."""

    def __init__(self, model: ModelEncoder):
        self.model = model

    @classmethod
    def from_hf_dir(cls, hf_dir: Path, spec: ModelSpec, family: Family) -> LengthCounter:
        """Raises InputError: see `ModelEncoder.from_hf_dir`."""
        return cls(ModelEncoder.from_hf_dir(hf_dir, spec, family))

    def num_tokens(
        self, turns: tuple[Turn, ...], media: tuple[StoredMedia, ...], tools: str = ""
    ) -> int:
        """Tokens of one conversation.

        Raises:
            BadEntry: it cannot be encoded.
        """
        try:
            tokens, _, _ = self.model.encode(turns, media, tools)
        except BadMedia as error:
            raise BadEntry("unusable media", str(error)) from error
        return tokens.numel()
