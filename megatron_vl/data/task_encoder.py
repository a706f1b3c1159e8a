"""energon's task encoder: text and sizes first, then packing, and only then pixels.

`preencode_sample` makes integers of a sample from its text and its image's header;
`select_samples_to_pack` groups samples to rows; `pack_selected_samples` decodes the images of what
was picked; `batch` lays the rows out. All of it is deterministic and stateless but the packing
buffer, so that a checkpointed loader replays exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from megatron.energon import SavableDataset, TaskEncoder, VQASample, WorkerConfig, stateless
from megatron.energon.cache import FileStoreDecoder
from megatron.energon.errors import SampleException
from megatron.energon.wrappers import PackingDataset

from megatron_vl.data.chat import BadConversation, ChatTokenizer
from megatron_vl.data.formats.llava import question_and_answer
from megatron_vl.data.media import BadImage, ImageProcessor
from megatron_vl.data.packing import pack
from megatron_vl.data.rows import Row, make_batch, make_row
from megatron_vl.data.samples import EncodedSample, RowBatch, sample_name
from megatron_vl.errors import InputError
from megatron_vl.models.common.mrope import rope_index


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
            return json.loads(data)
        return data.decode("utf-8") if kind in ("txt", "text") else data

    def config(self) -> dict:
        return {"decoder": "text"}


class SampleEncoder(TaskEncoder):
    """VQA samples to integers; the part that packing and pixels do not touch."""

    decoder = TextDecoder()

    def __init__(self, *, chat: ChatTokenizer, images: ImageProcessor, row_length: int,
                 packs: bool, length_mend: str):
        """
        Args:
            row_length: tokens a row holds; a longer sample is an error.
            packs: whether samples share rows.
            length_mend: what to do about a sample that is too long, for the message.
        """
        self.chat = chat
        self.images = images
        self.row_length = row_length
        self.packs = packs
        self.length_mend = length_mend

    @stateless
    def preencode_sample(self, sample: VQASample) -> EncodedSample:
        """Tokens, labels, positions and the image's grid; no pixel is decoded.

        Raises:
            InputError: the sample cannot be used; named, with the mend.
        """
        image, question, answer = sample.image, sample.context, sample.answers
        answer = answer[0] if isinstance(answer, (list, tuple)) and answer else answer
        if not (isinstance(image, bytes) and isinstance(question, str) and isinstance(answer, str)):
            raise InputError(
                f"sample {sample_name(sample)} is not an image's bytes, a question and an answer; "
                f"check the field_map in the dataset's .nv-meta/dataset.yaml."
            )
        try:
            grid = self.images.grid(image)
            tokens, labels = self.chat.encode(
                question_and_answer(question, answer), [self.images.num_tokens(grid)]
            )
        except BadImage as error:
            raise bad_image(sample, error) from error
        except BadConversation as error:
            raise InputError(
                f"sample {sample_name(sample)} cannot be used: {error}; mend or remove it and "
                f"prepare the dataset again."
            ) from error
        if tokens.numel() > self.row_length:
            raise InputError(
                f"sample {sample_name(sample)} has {tokens.numel()} tokens but a row holds "
                f"{self.row_length}; {self.length_mend}."
            )
        return EncodedSample.derive_from(
            sample,
            tokens=tokens,
            labels=labels,
            position_ids=rope_index(
                tokens,
                image_token=self.chat.tokens.image,
                video_token=self.chat.tokens.video,
                merge_size=self.images.merge_size,
                image_grids=[grid],
            ),
            grids=torch.tensor([grid], dtype=torch.int64),
            images=(image,),
        )

    def decode_images(self, sample: EncodedSample) -> EncodedSample:
        """Fill `patches` from the images' bytes, and let the bytes go.

        Raises:
            InputError: an image that cannot be decoded; the sample and its shard are named.
        """
        try:
            patches = [self.images.patches(data) for data in sample.images]
        except BadImage as error:
            raise bad_image(sample, error) from error
        sample.patches = patches[0] if len(patches) == 1 else torch.cat(patches)
        sample.images = ()
        return sample

    def make_batch(self, rows: list[Row]) -> RowBatch:
        return make_batch(rows, row_length=self.row_length, pad_token=self.chat.pad_token)

    def select(self, samples: list[EncodedSample]) -> list[list[EncodedSample]]:
        """Groups of samples that share a row."""
        if not self.packs:
            return [[sample] for sample in samples]
        bins = pack([sample.tokens.numel() for sample in samples], self.row_length)
        return [[samples[index] for index in members] for members in bins]


class RowEncoder(SampleEncoder):
    """The whole way from samples to batches of rows, as energon drives it in training."""

    def select_samples_to_pack(self, samples: list[EncodedSample]) -> list[list[EncodedSample]]:
        return self.select(samples)

    @stateless
    def pack_selected_samples(self, samples: list[EncodedSample]) -> Row:
        # Not in `postencode_sample`: energon 7.4.1 cannot restore a pack by its key with one.
        return make_row([self.decode_images(sample) for sample in samples])

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
        rows = _QuietPacking(
            dataset,
            buffer_size=packing_buffer_size or 1,
            pre_packer=self.select_samples_to_pack,
            final_packer=self.pack_selected_samples,
            final_packer_stateless=True,
            worker_config=worker_config,
        )
        return super().build_batch(
            rows,
            batch_size=batch_size,
            batch_drop_last=batch_drop_last,
            worker_config=worker_config,
        )


class _QuietPacking(PackingDataset):
    """energon's packing without the progress bar every worker would write to the log."""

    def _fill_reading_buffer(self, source_iter: Iterator, log_progress: bool = False) -> bool:
        return super()._fill_reading_buffer(source_iter)


def bad_image(sample, error: BadImage) -> InputError:
    return InputError(
        f"the image of sample {sample_name(sample)} is unusable: {error}; replace or remove it and "
        f"prepare the dataset again."
    )


def stop_on_error(error: Exception, sample: Any, sources: list | None) -> None:
    """energon's error handler: nothing is skipped, and the error says which sample it was.

    energon's default prints the error and goes on, up to 100 times in a row.
    """
    if isinstance(error, InputError):
        raise error
    # A raw sample is energon's internal tuple of parts; an encoded one is a dataclass.
    data = getattr(sample, "data", None)
    raw = data[0] if data else sample
    key = raw.get("__key__") if isinstance(raw, dict) else getattr(raw, "__key__", None)
    sources = sources or (raw.get("__sources__") if isinstance(raw, dict) else None)
    name = f"{sources[0].shard_name}/{key}" if sources else str(key)
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
