"""How many steps a run is that was told in epochs.

Where a row is a sample they are counted. Where rows are packed nobody knows before all samples have
been tokenised: they are forecast, as `megatron-vl lint` does, and the learning rate's schedule is
as long. The run itself ends when so many samples were read, those left out included: see
`Show.ended`. It may do so before its schedule does: see `short_of_schedule`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_vl.errors import InputError
from megatron_vl.training.checkpoint.start import hf_directory
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.paths import mixtures
from megatron_vl.training.rows import forecaster, nothing_fits


def with_steps(config: TrainConfig) -> TrainConfig:
    """`config` with the steps that its epochs come to; as it is where it names none.

    Raises:
        InputError: data without an epoch, or that cannot be read; a warmup that is too long.
    """
    epochs, data = config.batch.num_train_epochs, config.data.train_data_path
    hf_dir = hf_directory(config)
    if epochs is None or data is None or hf_dir is None:  # refused with the plan
        return config
    steps = steps_of(config, epochs)
    config = replace(config, batch=replace(config.batch, train_iters=steps))
    config.check_warmup()
    return config


def steps_of(config: TrainConfig, epochs: float) -> int:
    """Optimizer steps in which every sample is read `epochs` times.

    Raises:
        InputError: data without an epoch, or that cannot be read.
    """
    from megatron_vl.data.lint.reading import epoch_of

    train, _ = mixtures(config)
    train.check("train")
    samples = epoch_of(train)
    if samples is None:
        raise InputError(
            f"num-train-epochs {epochs:g} is given but datasets mixed by weight have no common "
            f"epoch; give train-iters, or the datasets without weights."
        )
    rows = _packed_rows(config) if config.data.packs else samples
    return max(1, math.ceil(epochs * rows / config.batch.global_batch_size))


def with_steps_of_rank_0(config: TrainConfig) -> TrainConfig:
    """The same on every rank, of which one reads the data.

    Raises:
        InputError: on every rank, see `with_steps`.
    """
    if config.batch.num_train_epochs is None:
        return config
    import torch

    found: list = [None]
    if torch.distributed.get_rank() == 0:
        try:
            found = [with_steps(config).batch.train_iters]
        except InputError as error:
            found = [str(error)]
    torch.distributed.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise InputError(found[0])
    return replace(config, batch=replace(config.batch, train_iters=found[0]))


def short_of_schedule(config: TrainConfig, done: int) -> str:
    """What is to be told of a run of epochs that ended after `done` steps; empty if nothing is."""
    epochs, options = config.batch.num_train_epochs, config.optimizer
    follows = options.lr_decay_iters is None and options.lr_decay_style != "constant"
    if epochs is None or not follows or done >= config.decay_iters:
        return ""
    why = ("rows hold more samples than was forecast, or samples were left out"
           if config.data.packs else "samples were left out")
    return (
        f"warning: the learning rate did not reach min-lr: num-train-epochs {epochs:g} came to "
        f"{done} steps instead of the {config.decay_iters} of its schedule, as {why}; "
        f"lr-decay-iters {done} makes a schedule as long as the run"
    )


def _packed_rows(config: TrainConfig) -> int:
    """Rows of an epoch, by a forecast."""
    found = forecaster(config).rows(config.batch.seq_length, config.data.max_patches_per_row)
    if found.rows is None:
        raise nothing_fits(config)
    return found.rows
