"""How the rows of a run's data come out, by a look at some of its samples.

The samples are encoded and packed as in training, spread over the shards; no image is decoded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_vl.errors import InputError
from megatron_vl.models.family import Grid
from megatron_vl.models.registry import family, load_spec
from megatron_vl.training.checkpoint.start import hf_directory
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.paths import media_limits, mixtures, trained_text

if TYPE_CHECKING:
    from megatron_vl.data.lint.forecast import Forecaster

LOOKED_AT = 2000  # samples


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSample:
    """A sample of a row."""

    tokens: int
    trained: int  # of them, with a loss
    grids: tuple[Grid, ...]  # patches of its images and videos


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRows:
    """Some rows that stand for all of a run's."""

    rows: tuple[tuple[RowSample, ...], ...]
    source: str  # what they are made of, in words


def forecaster(config: TrainConfig) -> Forecaster:
    """Of the training data of `config`.

    Raises:
        InputError: data that cannot be read, or a tokenizer or image settings that cannot be used.
    """
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
    return Forecaster(leaves, looks, endless=True, seed=rules.seed)


def dataset_rows(config: TrainConfig) -> DataRows:
    """Rows of the training data, packed as in training.

    Raises:
        InputError: see `forecaster`; or no sample fits a row.
    """
    found = forecaster(config)
    rows = found.packed(config.batch.seq_length, config.data.max_patches_per_row)
    if not rows:
        raise nothing_fits(config)
    looks = [look for seen in found.seen for look in seen]
    total = sum(len(leaf.places) for leaf in found.leaves)
    lost = Counter(look.reason for look in looks if look.reason is not None)
    because = {look.reason: look.message for look in reversed(looks)}  # of the first each
    why = ", ".join(f"{reason}: {number:,}, as {because[reason]}"
                    for reason, number in lost.most_common())
    return DataRows(
        rows=tuple(tuple(RowSample(tokens=one.tokens, trained=one.trained, grids=one.grids)
                         for one in row) for row in rows),
        source=f"{config.data.train_data_path}, of which {len(looks):,} of {total:,} samples were "
        f"looked at" + (f" and {lost.total():,} cannot be used ({why})" if lost else ""),
    )


def nothing_fits(config: TrainConfig) -> InputError:
    """That no sample of the training data fits a row."""
    train, _ = mixtures(config)
    return InputError(
        f"no sample of {train} fits a row of {config.batch.seq_length} tokens; raise seq-length, "
        f"or look at them with megatron-vl lint."
    )
