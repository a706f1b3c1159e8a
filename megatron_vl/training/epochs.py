"""How many steps a run is that was told in epochs.

Where a row is a sample they are counted. Where rows are packed nobody knows before all samples have
been tokenised: they are forecast, as `megatron-vl lint` does, and the learning rate's schedule is
as long. The run itself ends when so many samples were read: see `Show.ended`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_vl.errors import InputError
from megatron_vl.models.registry import family, load_spec
from megatron_vl.training.checkpoint.start import hf_directory
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.paths import media_limits, mixtures, trained_text

LOOKED_AT = 2000  # samples that a forecast is made of


def with_steps(config: TrainConfig) -> TrainConfig:
    """`config` with the steps that its epochs come to; as it is where it names none.

    Raises:
        InputError: data without an epoch, or that cannot be read; a warmup that is too long.
    """
    epochs, data = config.batch.num_train_epochs, config.data.train_data_path
    hf_dir = hf_directory(config)
    if epochs is None or data is None or hf_dir is None:  # refused with the plan
        return config
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
    steps = math.ceil(epochs * rows / config.batch.global_batch_size)
    config = replace(config, batch=replace(config.batch, train_iters=max(1, steps)))
    config.check_warmup()
    return config


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


def _packed_rows(config: TrainConfig) -> int:
    """Rows of an epoch, by a forecast."""
    from megatron_vl.data.lint.forecast import Forecaster
    from megatron_vl.data.lint.look import Looker, build_encoder
    from megatron_vl.data.lint.reading import choose, open_leaves
    from megatron_vl.data.load.config import DataConfig

    hf_dir, (train, _) = hf_directory(config), mixtures(config)
    rules = DataConfig(
        train=train, seq_length=config.batch.seq_length, media=media_limits(config),
        trained=trained_text(config), max_patches_per_row=config.data.max_patches_per_row,
        seed=config.model.seed,
    )
    leaves = open_leaves(train, "train")
    spec = load_spec(hf_dir)
    encoder = build_encoder(rules, hf_dir, spec, family(spec.model_type), split="train")
    looker = Looker(leaves, encoder)
    looks = [
        look for place in choose(leaves, LOOKED_AT, seed=rules.seed)
        if (look := looker.look(*place)) is not None
    ]
    found = Forecaster(leaves, looks, endless=True, seed=rules.seed).rows(
        rules.seq_length, rules.max_patches_per_row
    )
    if found.rows is None:
        raise InputError(
            f"no sample of {train} fits a row of {rules.seq_length} tokens; raise seq-length, or "
            f"look at them with megatron-vl lint."
        )
    return found.rows
