"""What makes integers and patches of conversations for one model; training, lint and prepare alike.

L tokens a sample, P patches, D numbers a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megatron_vl.data.conversation import BadEntry, Turn
from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.media import decoded
from megatron_vl.data.encode.prompt import PromptTokenizer
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.data.options import TrainedText
from megatron_vl.models.family import Family, Grid, Positions, Processor
from megatron_vl.models.media import MediaLimits, StoredMedia
from megatron_vl.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEncoder:
    """A model's tokenizer, media and positions."""

    chat: ChatTokenizer | PromptTokenizer
    processor: Processor | None  # None: the model takes text alone
    positions: Positions

    @classmethod
    def from_hf_dir(
        cls, hf_dir: Path, spec: ModelSpec, family: Family, *, limits: MediaLimits | None = None,
        trained: TrainedText | None = None,
    ) -> ModelEncoder:
        """Read the files beside config.json.

        Args:
            spec, family: the model's.

        Raises:
            InputError: see `ChatTokenizer.from_hf_dir`, `Family.prompt` and `Family.processor`.
        """
        limits = limits or MediaLimits()
        prompt, chat = family.prompt(hf_dir, spec), {"tokens": spec.tokens, "trained": trained}
        return cls(
            chat=ChatTokenizer.from_hf_dir(hf_dir, family=family, **chat) if prompt is None
            else PromptTokenizer(prompt, **chat),
            processor=family.processor(hf_dir, spec, limits),
            positions=family.positions(spec, limits.video_positions),
        )

    def encode(
        self, turns: Sequence[Turn], media: Sequence[StoredMedia], tools: str = ""
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Grid, ...]]:
        """Tokens and labels of one conversation, int64 [L], and the grids of its media.

        No pixel is decoded. See `ChatTokenizer.encode`.

        Raises:
            BadEntry: it cannot be encoded, or has media of a kind that the model does not take.
            BadMedia: an image or video that the model cannot take as it is.
        """
        grids = self._grids(media)
        tokens, labels = self.chat.encode(turns, self.places(grids), tools, **self._shown(media))
        return tokens, labels, grids

    def answers(
        self, turns: Sequence[Turn], media: Sequence[StoredMedia], grids: Sequence[Grid],
        tools: str = "",
    ) -> torch.Tensor:
        """Of each token of a sample whether its label is what greedy decoding is to give, bool [L].

        More may be trained than that, as prompts are with train-on-prompt.
        """
        _, labels = self.chat.encode(
            turns, self.places(grids), tools, answers_alone=True, **self._shown(media)
        )
        return labels != IGNORE

    def encode_prompt(
        self, turns: Sequence[Turn], media: Sequence[StoredMedia], tools: str = "", *,
        thinking: bool | None = None,
    ) -> tuple[torch.Tensor, tuple[Grid, ...]]:
        """Tokens that the answer to the last turn follows, int64 [L], and the grids of the media.

        No pixel is decoded. See `ChatTokenizer.encode_prompt`.

        Raises:
            BadEntry, BadMedia: see `encode`.
        """
        grids = self._grids(media)
        tokens = self.chat.encode_prompt(
            turns, self.places(grids), tools, thinking=thinking, **self._shown(media)
        )
        return tokens, grids

    def written(self, turns: Sequence[Turn], media: Sequence[StoredMedia]) -> str:
        """What the last turn says, as the model writes it; `[image]` where it shows one.

        Raises:
            BadEntry: the model has no form for its objects.
        """
        shown = self.chat.rendered(turns, lambda number: self.processor.pixels(media[number]))[-1]
        return "".join(f"[{part.media}]" if part.media else part.text for part in shown.parts)

    def _grids(self, media: Sequence[StoredMedia]) -> tuple[Grid, ...]:
        taken = self.chat.tokens.media_kinds
        if untaken := sorted({one.kind for one in media}.difference(taken)):
            raise BadEntry(
                "not served",
                f"it has {_plural(untaken)}, but the model takes {_plural(taken) or 'text'} alone; "
                f"train a model that takes them, or remove the sample",
            )
        return tuple(self.processor.shape(one) for one in media)

    def _shown(self, media: Sequence[StoredMedia]) -> dict:
        return {"pixels": lambda number: self.processor.pixels(media[number]),
                "media_names": [one.name for one in media],
                "media_times": [self.processor.times(one) for one in media]}

    def places(self, grids: Sequence[Grid]) -> list[int]:
        """Tokens of each image and video."""
        return [self.processor.num_tokens(grid) for grid in grids]

    def seconds(self, media: Sequence[StoredMedia]) -> tuple[float, ...]:
        """Of each: see `Processor.seconds`."""
        return tuple(self.processor.seconds(one) for one in media)

    def load(
        self, media: Sequence[StoredMedia], grids: Sequence[Grid], read: Callable[[str], bytes],
        patches_PD: torch.Tensor,
    ) -> None:
        """Read and decode the media of one sample into `patches_PD`.

        Args:
            read: a file's bytes by its name in `media`.

        Raises:
            BadMedia: an image or video that cannot be read or decoded.
        """
        at = 0
        for one, grid in zip(media, grids, strict=True):
            end = at + prod(grid)
            load_media(self.processor, one, read, out=patches_PD[at:end])
            at = end


def load_media(
    processor: Processor, media: StoredMedia, read: Callable[[str], bytes],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Patches of one image or video, float32 [P, D], read and decoded.

    Args:
        out: where to write them.

    Raises:
        BadMedia: it cannot be read or decoded, or is not of the size it was prepared with.
    """
    return processor.load(media, decoded(media, read, processor.frames(media)), out)


def _plural(kinds: Sequence[str]) -> str:
    return " and ".join(f"{kind}s" for kind in kinds)
