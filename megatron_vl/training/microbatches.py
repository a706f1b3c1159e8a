"""What training and validation share: their loaders, and microbatches through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import tee

import torch
from megatron.core import parallel_state

from megatron_vl.data.encode.samples import RowBatch
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader, build_valid_loader
from megatron_vl.data.load.row_loader import RowLoader
from megatron_vl.models.registry import family
from megatron_vl.platform import current_device
from megatron_vl.training.exchange import RowExchange
from megatron_vl.training.paths import media_limits, mixtures, trained_text
from megatron_vl.training.plan import Plan
from megatron_vl.training.resilience.hang import HangWatch
from megatron_vl.training.step import (
    RowStream,
    forward_step,
    naming_rows,
    run_schedule,
    streams_of,
)


class Microbatches:
    """Rows on every rank, and Megatron-Core's schedule over them; all ranks create it together.

    Args:
        model: this rank's chunks, wrapped for data parallelism.
        watch: is told of every microbatch.
        timed: entered around a chunk's own work while it is trained.
    """

    def __init__(self, plan: Plan, model: list, watch: HangWatch, *, timed: Callable):
        self.plan, self.model, self.watch, self.timed = plan, model, watch, timed
        self.device = current_device()
        self.exchange = RowExchange(plan.layout, plan.config.parallel.distributed_timeout_minutes)

    def streams(self, batches: Iterator[RowBatch] | None) -> list[RowStream]:
        """One stream a model chunk; chunks of one rank see the same rows."""
        copies = tee(self.exchange.rows(batches), len(self.model))
        return streams_of(self.model, copies, self.device)

    def backward(self, streams: list[RowStream], optimizer) -> list:
        """Leaves a step's gradients in the model's buffers; returns what `run` does."""
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        return self.run(streams, self.plan.num_microbatches, forward_only=False)

    def run(self, streams: list[RowStream], num_microbatches: int, forward_only: bool) -> list:
        """See `run_schedule`."""
        batch = self.plan.config.batch
        work = partial(
            forward_step, per_sample=batch.calculate_per_sample_loss,
            **({} if forward_only else {"timed": self.timed}),
        )

        def step(*arguments):
            self.watch.beat()
            return work(*arguments)

        with naming_rows(streams):
            outputs = run_schedule(
                self.model, streams, num_microbatches=num_microbatches,
                row_length=self.plan.row_length, forward_only=forward_only,
                micro_batch_size=batch.micro_batch_size, step=step,
            )
        self.exchange.settle()
        return outputs


def train_loader(plan: Plan) -> RowLoader:
    """This replica's, over the training split; see `build_train_loader`."""
    return build_train_loader(
        _data_config(plan), data_parallel_group=parallel_state.get_data_parallel_group(),
        **_reader(plan),
    )


def train_loader_of(plan: Plan, dp_rank: int, dp_size: int) -> RowLoader:
    """That of a rank of another data-parallel size."""
    place = {"dp_rank": dp_rank, "dp_size": dp_size}
    return build_train_loader(_data_config(plan), **_reader(plan) | place)


def valid_loader(plan: Plan) -> RowLoader:
    """This replica's, over the validation split or its first `eval_iters` batches."""
    limit = (plan.config.data.eval_iters or 0) * plan.num_microbatches
    return build_valid_loader(_data_config(plan), max_batches=limit or None, **_reader(plan))


def _data_config(plan: Plan) -> DataConfig:
    data, batch = plan.config.data, plan.config.batch
    train, valid = mixtures(plan.config)
    return DataConfig(
        train=train,
        valid=valid,
        seq_length=batch.seq_length,
        truncate_samples=data.truncate_samples,
        max_padding_length=batch.max_padding_length,
        row_multiple=plan.row_multiple,
        micro_batch_size=batch.micro_batch_size,
        num_workers=data.num_workers,
        packing_buffer_size=data.packing_buffer_size,
        shuffle_buffer_size=data.shuffle_buffer_size,
        max_samples_per_sequence=data.max_samples_per_sequence,
        max_patches_per_row=data.max_patches_per_row,
        max_skipped_samples=data.max_skipped_samples,
        media=media_limits(plan.config),
        trained=trained_text(plan.config),
        pixel_dtype=getattr(torch, plan.config.model.dtype),
        seed=plan.config.model.seed,
    )


def _reader(plan: Plan) -> dict:
    return dict(
        hf_dir=plan.hf_dir,
        spec=plan.spec,
        family=family(plan.spec.model_type),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )
