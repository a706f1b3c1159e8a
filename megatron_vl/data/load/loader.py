"""Loaders: a prepared dataset and a Hugging Face directory to batches of rows.

Rows depend on the data-parallel rank and the number of workers, never on the layout of a model
replica. The trainer builds one loader a replica, on the stage with the vision tower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch.distributed
from megatron.energon import (
    SavableDataLoader,
    SavableDataset,
    WorkerConfig,
    get_train_dataset,
    get_val_dataset,
)
from megatron.energon.savable_loader import (
    BasicDataLoader,
)
from megatron.energon.wrappers.base import BaseWrapperDataset
from megatron.energon.wrappers.gc_dataset import GC_DEFAULT_EVERY_N_ITER

from megatron_vl.data.encode.model import ModelEncoder
from megatron_vl.data.encode.previews import Candidates, preview_of
from megatron_vl.data.encode.rows import empty_row
from megatron_vl.data.encode.samples import EncodedSample, RowBatch
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.load.resume import CONTENT, DATA
from megatron_vl.data.load.row_loader import RowLoader
from megatron_vl.data.load.shard_files import note_places
from megatron_vl.data.load.task_encoder import RowEncoder, SampleEncoder, stop_on_error
from megatron_vl.errors import InputError
from megatron_vl.models.family import Family
from megatron_vl.models.media import BadMedia
from megatron_vl.models.spec import ModelSpec


def build_train_loader(
    config: DataConfig,
    *,
    hf_dir: Path,
    spec: ModelSpec,
    family: Family,
    dp_rank: int = 0,
    dp_size: int = 1,
    data_parallel_group: torch.distributed.ProcessGroup | None = None,
) -> RowLoader:
    """An endless, shuffled, resumable loader over the training split.

    Args:
        hf_dir: the model's tokenizer and preprocessor_config.json.
        spec, family: the model's; of the spec `vision` and `tokens` are read.
        dp_rank, dp_size: the pure data-parallel coordinates, not counting context parallelism.

    Raises:
        InputError: a dataset, tokenizer or image settings that cannot be used.
    """
    if config.train is None:
        raise InputError("there is no training dataset; give its directory.")
    readers = dp_size * max(1, config.num_workers)
    for path, samples in config.train.check("train").items():
        if samples < readers:
            raise InputError(
                f"the training split of {path} has {samples} samples for {readers} reading "
                f"processes (data-parallel size x workers); ask for fewer workers."
            )
    datasets = config.train.names("train")
    encoder = RowEncoder(**_encoder_parts(config, hf_dir, spec, family), datasets=datasets)
    workers = _workers(config, dp_rank, dp_size, config.num_workers, datasets, data_parallel_group)
    with field_map_errors(config.train):
        dataset = get_train_dataset(
            config.train.as_energon("train"),
            split_part="train",
            worker_config=workers,
            batch_size=config.micro_batch_size,
            batch_drop_last=True,
            packing_buffer_size=config.packing_buffer_size or None,
            shuffle_buffer_size=config.shuffle_buffer_size or None,
            max_samples_per_sequence=config.max_samples_per_sequence,
            task_encoder=encoder,
        )
    note_places(dataset)
    loader = SavableDataLoader(dataset, **_housekeeping(config))
    return RowLoader(loader, _made_for(config, dp_rank, dp_size), encoder.epoch)


def build_valid_loader(
    config: DataConfig,
    *,
    hf_dir: Path,
    spec: ModelSpec,
    family: Family,
    dp_rank: int = 0,
    dp_size: int = 1,
    max_batches: int | None = None,
) -> RowLoader:
    """One pass over the validation split, in order, each time it is iterated.

    The rows are the same for every data-parallel size: every rank reads the integers of the whole
    split, and decodes and yields the rows that are its own. All ranks yield the same number of
    batches, all of `micro_batch_size` rows, without a word between them; where rows run out, rows
    of padding that train nothing fill the last batch.

    Args:
        max_batches: stop after so many batches a rank; None reads the whole split.

    Raises:
        InputError: as `build_train_loader`.
    """
    if config.valid is None:
        raise InputError("there is no validation dataset; give its directory.")
    config.valid.check("val")
    datasets = config.valid.names("val")
    encoder = SampleEncoder(
        **_encoder_parts(config, hf_dir, spec, family), datasets=datasets, scored=True
    )
    # One process reads in order; the split into ranks comes after packing.
    workers = _workers(config, 0, 1, min(1, config.num_workers), datasets)
    with field_map_errors(config.valid):
        samples = get_val_dataset(
            config.valid.as_energon("val"),
            split_part="val",
            worker_config=workers,
            batch_size=None,
            task_encoder=encoder,
        )
    note_places(samples)
    rows = _OwnRows(
        samples, encoder=encoder, config=config, dp_rank=dp_rank, dp_size=dp_size,
        max_batches=max_batches,
    )  # fmt: skip
    return RowLoader(
        BasicDataLoader(rows, **_housekeeping(config)), chat=encoder.model.chat
    )


class _OwnRows(BaseWrapperDataset[EncodedSample, RowBatch]):
    """The batches of one data-parallel rank: row r belongs to rank r modulo the ranks."""

    def __init__(self, samples: SavableDataset, *, encoder: SampleEncoder, config: DataConfig,
                 dp_rank: int, dp_size: int, max_batches: int | None):
        super().__init__(samples, worker_config=samples.worker_config)
        self.encoder = encoder
        self.settings = config
        self.dp_rank, self.dp_size, self.max_batches = dp_rank, dp_size, max_batches

    def __iter__(self) -> Iterator[RowBatch]:
        size = self.settings.micro_batch_size
        rows, count, batches, candidates = [], 0, 0, Candidates()
        for group in self._groups():
            if count % self.dp_size == self.dp_rank:
                for sample in group:
                    _preview(sample, candidates)
                rows.append(self.encoder.make_row(group) or empty_row())
            count += 1
            # A batch goes out once every rank has its rows for it, so that all stop alike.
            if count % (size * self.dp_size) == 0:
                yield self.encoder.make_batch(rows)
                rows, batches = [], batches + 1
                if batches == self.max_batches:
                    return
        if count % (size * self.dp_size):
            rows += [empty_row()] * (size - len(rows))
            yield self.encoder.make_batch(rows)

    def _groups(self) -> Iterator[list[EncodedSample]]:
        """Samples of one row after the other, over all ranks."""
        size = self.settings.packing_buffer_size or 1
        window = []
        for sample in self.dataset:
            window.append(sample)
            if len(window) == size:
                yield from self.encoder.select(window)
                window = []
        yield from self.encoder.select(window)

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)  # an upper bound, as energon's own packing's

    def reset_state_own(self) -> None:
        pass

    def config(self) -> dict:
        return {"type": type(self).__qualname__, "dataset": self.dataset.config()}


def _preview(sample: EncodedSample, candidates: Candidates) -> None:
    """Give a sample that may be shown its preview; the files are there, and being read anyway."""
    if candidates.wants(sample.dataset, sample.name):
        try:
            sample.preview = preview_of(
                sample.name, sample.dataset, sample.turns, sample.media, sample.read
            )
        except BadMedia:  # as its row will find, which leaves it out
            return
        candidates.add(sample.dataset, sample.name)


def _encoder_parts(config: DataConfig, hf_dir: Path, spec: ModelSpec, family: Family) -> dict:
    model = ModelEncoder.from_hf_dir(
        hf_dir, spec, family, limits=config.media, trained=config.trained
    )
    return {"model": model, "rules": config.rules}


def _made_for(config: DataConfig, dp_rank: int, dp_size: int) -> dict:
    """All that decides which samples come when, by the names of the options where there are."""
    return {
        DATA: config.train.fingerprint(),
        CONTENT: config.train.contents("train"),
        "row length": config.row_length,
        "packing_buffer_size": config.packing_buffer_size or 0,
        "micro_batch_size": config.micro_batch_size,
        "num_workers": config.num_workers,
        "shuffle_buffer_size": config.shuffle_buffer_size,
        "max_samples_per_sequence": config.max_samples_per_sequence,
        "max_patches_per_row": config.max_patches_per_row,
        **{f.name: getattr(config.media, f.name) for f in fields(config.media)},
        "seed": config.seed,
        "data-parallel size": dp_size,
        "data-parallel rank": dp_rank,
    }


def _workers(
    config: DataConfig, rank: int, size: int, num_workers: int, datasets: dict[str, str],
    group: torch.distributed.ProcessGroup | None = None,
) -> WorkerConfig:
    return WorkerConfig(
        rank=rank,
        world_size=size,
        num_workers=num_workers,
        data_parallel_group=group,
        seed_offset=config.seed,
        global_error_handler=partial(stop_on_error, datasets=datasets),
    )


def _housekeeping(config: DataConfig) -> dict:
    """energon collects garbage every few batches: right in a worker, a stall in the trainer."""
    return {
        "gc_collect_every_n_steps": GC_DEFAULT_EVERY_N_ITER if config.num_workers else 0,
        "watchdog_timeout_seconds": None,
    }


@contextlib.contextmanager
def field_map_errors(mixture: Mixture) -> Iterator[None]:
    """energon's complaints about dataset.yaml as one sentence."""
    try:
        yield
    except (AssertionError, ValueError, TypeError, KeyError, ImportError) as error:
        raise InputError(
            f"the .nv-meta/dataset.yaml of {mixture} cannot be used ({str(error).strip()}); it "
            f"must be as `megatron-vl prepare` writes it, or name sample_type VQASample and a "
            f"field_map of image, context and answers."
        ) from error
