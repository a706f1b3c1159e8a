"""energon's task encoder: text and sizes first, then packing, and only then pixels.

A cooker makes a conversation of a sample's JSON; `preencode_sample` makes integers of it, with the
media's sizes from the same JSON; `select_samples_to_pack` groups samples to rows;
`pack_selected_samples` reads and decodes the media of what was picked; `batch` lays the rows out.
All of it is deterministic and stateless but the packing buffer, so that a checkpointed loader
replays exactly.

A sample that cannot be trained on is left out, and travels on by name with the next batch, to be
counted and shown.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.energon import (
    Cooker,
    Sample,
    SavableDataset,
    SkipSample,
    TaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    stateless,
)
from megatron.energon.cache import FileStoreDecoder
from megatron.energon.errors import SampleException
from megatron.energon.wrappers import RepeatDataset

from megatron_vl.data.conversation import BadEntry
from megatron_vl.data.encode.model import ModelEncoder
from megatron_vl.data.encode.packing import pack
from megatron_vl.data.encode.rows import Row, least_length, make_batch, make_row
from megatron_vl.data.encode.samples import (
    IGNORE,
    ConversationSample,
    EncodedSample,
    RowBatch,
    Skipped,
    dataset_name,
    sample_name,
)
from megatron_vl.data.encode.stored import read_stored
from megatron_vl.data.load.energon_samples import SERVED, conversation_of
from megatron_vl.data.load.epochs import RowPacking, WholeEpochs
from megatron_vl.data.load.shard_files import PLACES, ShardFiles
from megatron_vl.errors import InputError, printable
from megatron_vl.inputs import json_value
from megatron_vl.models.family import Grid
from megatron_vl.models.media import IMAGE, VIDEO, BadMedia, StoredMedia

_ENCODE, _DECODE = "encode", "decode"
_MANY_TIMES, _MANY = 10, 100  # all samples so often, and so many


class TextDecoder(FileStoreDecoder):
    """Decodes a sample's JSON and text; media stay the file's own bytes."""

    def __call__(self, sample: dict) -> dict:
        return {
            name: value if name.startswith("__") else self.decode(name, value)
            for name, value in sample.items()
        }

    def decode(self, fname: str, data: bytes) -> Any:
        kind = fname.rsplit(".", 1)[-1]
        if kind == "json":
            return json_value(data)
        return data.decode("utf-8") if kind in ("txt", "text") else data

    def config(self) -> dict:
        return {"decoder": "text"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRules:
    """What makes a row."""

    length: int  # tokens a row holds; a longer sample is skipped
    truncates: bool = False  # its end is cut off instead, where that is text
    multiple: int | None = None  # of which a batch's rows are the least that holds them; None: full
    packs: bool  # whether samples share rows
    length_option: str  # what says `length`, for messages
    max_patches: int | None = None  # patches a row holds at most; a larger sample is skipped
    max_skipped: int = 0  # samples that may be skipped before it is an error
    pixel_dtype: torch.dtype = torch.float32  # of a batch's patches

    def batch_length(self, rows: Sequence[Row]) -> int:
        """Tokens of each row of a batch that holds `rows`."""
        if self.multiple is None:
            return self.length
        return least_length(rows, multiple=self.multiple, most=self.length)


class SampleEncoder(TaskEncoder):
    """Samples to integers; the part that packing and pixels do not touch."""

    decoder = TextDecoder()

    def __init__(self, *, model: ModelEncoder, rules: RowRules,
                 datasets: Mapping[str, str] | None = None, scored: bool = False):
        """
        Args:
            datasets: names that tell datasets apart, by path: see `Mixture.names`.
            scored: samples say which of their tokens are answers.
        """
        self.model, self.scored = model, scored
        self.rules = rules
        self.datasets = datasets or {}
        self.files = ShardFiles()
        self.cookers = [Cooker(self.cook)]
        self.skipped: list[Skipped] = []  # since the last batch
        self.known_bad: set[str] = set()  # samples left out so far: an epoch brings them again
        self._in_vain: Counter[str] = Counter()  # left out since one was encoded, one decoded

    @stateless
    def cook(self, sample: dict) -> ConversationSample:
        """The conversation in a prepared sample's JSON; no media is read.

        Raises:
            SkipSample: it holds none.
        """
        try:
            turns, media, tools = read_stored(sample["json"])
        except (KeyError, ValueError) as error:
            self._skip(sample, "wrong shape", str(error))
        return ConversationSample(
            **basic_sample_keys(sample), turns=turns, media=media, tools=tools,
            read=self.files.reader(sample["__key__"], sample[PLACES]),
        )

    @stateless
    def preencode_sample(self, sample: Sample) -> EncodedSample:
        """Tokens, labels and grids of a conversation, or of one of `SERVED`; no pixel is decoded.

        Raises:
            SkipSample: the sample cannot be used; it is counted.
            InputError: too many could not, or the dataset's fields are of another kind.
        """
        try:
            if isinstance(sample, SERVED):
                sample = conversation_of(sample, self.name_of(sample))
            tokens, labels, grids = self.model.encode(sample.turns, sample.media, sample.tools)
            answers = None
            if self.scored:
                answers = self.model.answers(sample.turns, sample.media, grids, sample.tools)
            cut = tokens.numel() - self.rules.length if self.rules.truncates else 0
            # An image or video is whole, and so is the mark behind it.
            if cut > 0 and not self._places(tokens)[self.rules.length - 1 :].any():
                tokens, labels = self._truncated(tokens, labels, sample.media)
                answers = answers if answers is None else answers[: tokens.numel()]
            self._check_size(tokens.numel(), grids, sample.media)
        except BadMedia as error:
            self._skip(sample, "unusable media", f"its image or video is unusable: {error}")
        except BadEntry as error:
            self._skip(sample, error.reason, str(error))
        self._in_vain[_ENCODE] = 0
        return EncodedSample.derive_from(
            sample,
            name=self.name_of(sample),
            dataset=dataset_name(sample.__sources__, self.datasets),
            turns=sample.turns,
            tokens=tokens,
            labels=labels,
            answers=answers,
            tokens_cut=max(cut, 0),
            grids=grids,
            seconds=self.model.seconds(sample.media),
            media=sample.media,
            read=sample.read,
        )

    def _places(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of a sample's tokens [L] stand for images and videos: bool [L]."""
        return self.model.chat.tokens.places(tokens)

    def _truncated(
        self, tokens: torch.Tensor, labels: torch.Tensor, media: Sequence[StoredMedia]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As many tokens as a row holds, and their labels, both int64 [L].

        Raises:
            BadEntry: none of them is trained.
        """
        length = self.rules.length
        labels = labels[:length].clone()
        labels[-1] = IGNORE  # its target is cut off
        if (labels == IGNORE).all():
            raise BadEntry(
                "too long",
                f"it has {tokens.numel()} tokens, and nothing is trained of the first {length}, "
                f"which a row holds; {self._length_mend(media)}",
            )
        return tokens[:length].clone(), labels

    def _check_size(
        self, length: int, grids: Sequence[Grid], media: Sequence[StoredMedia]
    ) -> None:
        rules, patches = self.rules, sum(map(math.prod, grids))
        if length > rules.length:
            raise BadEntry(
                "too long",
                f"it has {length} tokens but a row holds {rules.length}; "
                f"{self._length_mend(media)}",
            )
        if rules.max_patches is not None and patches > rules.max_patches:
            raise BadEntry(
                "too many patches",
                f"its images and videos have {patches} patches but a row holds "
                f"{rules.max_patches}; raise max-patches-per-row{self._smaller_media(media)}, or "
                f"remove the sample",
            )

    def _length_mend(self, media: Sequence[StoredMedia]) -> str:
        """What to do about a sample that is too long."""
        return f"raise {self.rules.length_option}{self._smaller_media(media)}, or remove the sample"

    def _smaller_media(self, media: Sequence[StoredMedia]) -> str:
        """`, lower OPTION` that makes these images and videos smaller; empty if none does."""
        if not media or not self.model.processor.resizes:
            return ""
        options = {IMAGE: "image-max-pixels", VIDEO: "video-max-pixels or video-maxlen"}
        lower = " or ".join(options[kind] for kind in sorted({one.kind for one in media}))
        if any(one.settings is not None for one in media):
            lower += " or what the entry itself asks for"
        return f", lower {lower}"

    def make_row(self, samples: list[EncodedSample]) -> Row | None:
        """A row of the samples whose media can be decoded; None if none can."""
        count = sum(sample.num_patches for sample in samples)
        # Decoded in place: joining the samples' patches would write every pixel twice.
        patches_PD = torch.empty(count, self.model.processor.patch_dim if count else 0)
        decoded, at = [], 0
        for sample in samples:
            end = at + sample.num_patches
            try:
                self.decode_media(sample, patches_PD[at:end])
            except BadMedia as error:
                self._count(sample, "unusable media", f"its image or video is unusable: {error}",
                            step=_DECODE)
                continue
            self._in_vain[_DECODE] = 0
            decoded.append(sample)
            at = end
        if not decoded:
            return None
        return make_row(decoded, patches_PD[:at] if at else None)

    def decode_media(self, sample: EncodedSample, patches_PD: torch.Tensor) -> None:
        """Fill `patches_PD` from the media's files, and let go of what read them.

        Raises:
            BadMedia: an image or video that cannot be read or decoded.
        """
        self.model.load(sample.media, sample.grids, sample.read, patches_PD)
        sample.read = None

    def make_batch(self, rows: list[Row]) -> RowBatch:
        batch = make_batch(
            rows, row_length=self.rules.batch_length(rows), pad_token=self.model.chat.pad_token,
            positions=self.model.positions, pixel_dtype=self.rules.pixel_dtype,
        )
        batch.skipped, self.skipped = tuple(self.skipped), []
        return batch

    def select(self, samples: list[EncodedSample]) -> list[list[EncodedSample]]:
        """Groups of samples that share a row."""
        if not self.rules.packs:
            return [[sample] for sample in samples]
        bins = pack(
            [sample.num_tokens for sample in samples], self.rules.length,
            costs=[sample.num_patches for sample in samples], max_cost=self.rules.max_patches,
        )
        return [[samples[index] for index in members] for members in bins]

    def name_of(self, sample: Sample | dict) -> str:
        return sample_name(sample, self.datasets)

    def _skip(self, sample: Any, reason: str, message: str) -> None:
        self._count(sample, reason, message)
        raise SkipSample

    def _count(self, sample: Any, reason: str, message: str, *, step: str = _ENCODE) -> None:
        """Note a sample that is left out.

        Raises:
            InputError: it is one too many, or no other comes any more.
        """
        name = self.name_of(sample)
        first = name not in self.known_bad
        self.known_bad.add(name)
        if len(self.known_bad) > self.rules.max_skipped:
            others = len(self.known_bad) - 1
            many = "" if not others else (
                f", nor could {others} others before it; max-skipped-samples is "
                f"{self.rules.max_skipped}"
            )
            raise InputError(
                f"sample {name} cannot be used: {message}{many}; mend or remove it and prepare the "
                f"dataset again, or raise max-skipped-samples."
            )
        self._in_vain[step] += 1
        # An epoch that has no other sample is followed by the next, for ever.
        if self._in_vain[step] > _MANY_TIMES * len(self.known_bad) + _MANY:
            raise InputError(
                f"none of the last {self._in_vain[step]} samples can be used, which are "
                f"{len(self.known_bad)} again and again, as {name}: {message}; mend them and "
                f"prepare the dataset again."
            )
        self.skipped.append(Skipped(
            reason=reason, sample=printable(name), message=printable(message), first=first
        ))


class RowEncoder(WholeEpochs, SampleEncoder):
    """The whole way from samples to batches of rows, as energon drives it in training."""

    def select_samples_to_pack(self, samples: list[EncodedSample]) -> list[list[EncodedSample]]:
        return self.select(samples)

    @stateless
    def pack_selected_samples(self, samples: list[EncodedSample]) -> Row:
        # Not in `postencode_sample`: energon 7.4.1 cannot restore a pack by its key with one.
        row = self.make_row(samples)
        if row is None:
            raise SkipSample
        return row

    @stateless
    def batch(self, samples: list[Row]) -> RowBatch:
        return self.make_batch(samples)

    def build_batch(
        self,
        dataset: SavableDataset[EncodedSample],
        *,
        batch_size: int | None,
        batch_drop_last: bool = False,
        packing_buffer_size: int | None = None,
        worker_config: WorkerConfig,
    ) -> SavableDataset[RowBatch]:
        """energon's, but quiet; and a row of one sample takes the same way as a packed one."""
        rows = RowPacking(
            dataset,
            buffer_size=packing_buffer_size or 1,
            pre_packer=self.select_samples_to_pack,
            final_packer=self.pack_selected_samples,
            final_packer_stateless=True,
            worker_config=worker_config,
        )
        return super().build_batch(
            RepeatDataset(rows, worker_config=worker_config),
            batch_size=batch_size,
            batch_drop_last=batch_drop_last,
            worker_config=worker_config,
        )




def stop_on_error(
    error: Exception, sample: Any, sources: list | None, *,
    datasets: Mapping[str, str] | None = None,
) -> None:
    """energon's error handler: what is no sample's own fault stops the run and is named.

    energon's default prints the error and goes on, up to 100 times in a row.

    Args:
        datasets: see `sample_name`.
    """
    if isinstance(error, InputError):
        raise error
    # A raw sample is energon's internal tuple of parts; an encoded one is a dataclass.
    data = getattr(sample, "data", None)
    raw = data[0] if data else sample
    name = sample_name(raw, datasets or {}, sources)
    if isinstance(error, (SampleException, LookupError)):
        raise InputError(
            f"sample {name} lacks a part that the field_map of the dataset's "
            f".nv-meta/dataset.yaml names ({error}); correct the field_map, or prepare the dataset "
            f"again."
        ) from error
    if isinstance(error, (UnicodeDecodeError, json.JSONDecodeError)):
        raise InputError(
            f"sample {name} holds text or JSON that cannot be read ({error}); prepare the dataset "
            f"again."
        ) from error
    raise RuntimeError(f"sample {name}: {type(error).__name__}: {error}") from error
