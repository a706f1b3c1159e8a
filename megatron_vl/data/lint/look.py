"""One sample as training would see it: encoded by training's own encoder, or refused and why."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron.energon import SkipSample

from megatron_vl.data.conversation import BadEntry
from megatron_vl.data.encode.model import ModelEncoder
from megatron_vl.data.encode.samples import IGNORE, ConversationSample, EncodedSample
from megatron_vl.data.lint.reading import Leaf
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.energon_samples import SERVED, conversation_of
from megatron_vl.data.load.task_encoder import RowRules, SampleEncoder, stop_on_error
from megatron_vl.errors import InputError
from megatron_vl.models.family import Family, Grid
from megatron_vl.models.media import IMAGE, VIDEO, BadMedia, StoredMedia
from megatron_vl.models.spec import ModelSpec

STOPS = "stops training"  # beside the reasons for which training skips a sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What became of one sample."""

    leaf: int
    place: int
    name: str  # `shard.tar/key`
    reason: str | None = None  # why training would leave it out
    message: str | None = None  # the details
    media: tuple[StoredMedia, ...] = ()
    answers: int = 0  # turns of the assistant
    tokens: int | None = None  # None: it was not encoded
    trained: int = 0  # tokens that are trained
    grids: tuple[Grid, ...] = ()  # of its images and videos

    @property
    def patches(self) -> int:
        return sum(map(prod, self.grids))

    def count(self, kind: str) -> int:
        return sum(media.kind == kind for media in self.media)

    @property
    def kind(self) -> str:
        """What it shows: "video" if there is one, else "image", else "text"."""
        return VIDEO if self.count(VIDEO) else IMAGE if self.count(IMAGE) else "text"


class Looker:
    """Looks at samples one by one."""

    def __init__(self, leaves: Sequence[Leaf], encoder: _Encoder, *, decode: bool = False):
        """`decode`: also decode every image and video."""
        self.leaves = leaves
        self.encoder = encoder
        self.decode = decode

    def look(self, leaf: int, place: int) -> Look | None:
        """None: the dataset excludes this sample."""
        where = {"leaf": leaf, "place": place}
        path = self.leaves[leaf].path
        name = f"{self.encoder.datasets.get(str(path), path.name)}, sample {place}"
        try:
            raw = self.leaves[leaf].read(place)
            if raw is None:
                return None
            name = self.encoder.name_of(raw)
            sample = self.encoder.conversation(self.leaves[leaf].load(raw))
            encoded = self._encode(sample) if self.encoder.model else None
            if self.decode:
                self.encoder.make_row([encoded])
        except SkipSample:
            pass
        except (InputError, RuntimeError) as error:
            return Look(**where, name=name, reason=STOPS, message=str(error))
        skipped, self.encoder.skipped = self.encoder.skipped, []
        for problem in skipped:
            return Look(**where, name=name, reason=problem.reason, message=problem.message)
        found = {}
        if encoded is not None:
            found = {"tokens": encoded.num_tokens, "grids": tuple(encoded.grids),
                     "trained": int((encoded.labels != IGNORE).sum())}
        over = self.encoder.over
        return Look(
            **where, **found, name=name, media=sample.media,
            answers=sum(turn.role == "assistant" for turn in sample.turns),
            reason=over and over.reason, message=over and str(over),
        )

    def encode(self, look: Look) -> EncodedSample:
        """A sample that has been looked at and has tokens."""
        leaf = self.leaves[look.leaf]
        return self._encode(self.encoder.conversation(leaf.load(leaf.read(look.place))))

    def _encode(self, sample: ConversationSample) -> EncodedSample:
        self.encoder.over = None
        try:
            return self.encoder.preencode_sample(sample)
        except SkipSample:
            raise
        except Exception as error:  # as energon hands it on in training
            stop_on_error(error, sample, None, datasets=self.encoder.datasets)


class _Encoder(SampleEncoder):
    """Training's, but what is too large for a row is noted and encoded all the same."""

    over: BadEntry | None = None  # what is wrong with the size of the last sample

    def conversation(self, raw) -> ConversationSample:
        """A raw sample of either kind of dataset. Raises SkipSample: it cannot be used."""
        if isinstance(raw, dict):
            return self.cook(raw)
        try:
            return conversation_of(raw, self.name_of(raw)) if isinstance(raw, SERVED) else raw
        except BadMedia as error:
            self._skip(raw, "unusable media", f"its image or video is unusable: {error}")
        except BadEntry as error:
            self._skip(raw, error.reason, str(error))

    def _check_size(self, length: int, grids: list[Grid], media: Sequence[StoredMedia]) -> None:
        try:
            super()._check_size(length, grids, media)
        except BadEntry as error:
            self.over = error


def build_encoder(
    config: DataConfig, hf_dir: Path | None, spec: ModelSpec | None, family: Family | None, *,
    split: str,
) -> _Encoder:
    """Training's encoder of `config`; one that only reads conversations without a model.

    Raises:
        InputError: a tokenizer or image settings that cannot be used.
    """
    rules = RowRules(
        length=config.seq_length, packs=True, length_option=config.length_option,
        max_patches=config.max_patches_per_row, max_skipped=sys.maxsize,
    )  # fmt: skip
    model = None
    if hf_dir is not None:
        model = ModelEncoder.from_hf_dir(
            hf_dir, spec, family, limits=config.media, trained=config.trained
        )
    return _Encoder(model=model, rules=rules, datasets=config.train.names(split))
