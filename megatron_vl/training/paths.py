"""What a run reads and writes, and whether it is there; imports no Megatron-Core."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from megatron_vl.data.encode.model_files import check_model_files
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.options import TrainedText
from megatron_vl.errors import InputError
from megatron_vl.models.media import MediaLimits
from megatron_vl.models.registry import family, load_spec
from megatron_vl.outputs import check_writable
from megatron_vl.training.checkpoint.export import HF
from megatron_vl.training.checkpoint.start import hf_directory
from megatron_vl.training.options.checkpoint import CheckpointOptions
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.reporting.trackers import check_trackers
from megatron_vl.weights.found import others
from megatron_vl.weights.hf_io import is_hf_directory


def check_paths(config: TrainConfig) -> None:
    """The model's files, the datasets' splits, and whether what the run writes can be written and
    tracked.

    Looks at every shard: one process does it for all.

    Raises:
        InputError: no tokenizer or image settings, or such as are not the model's, a dataset
            without the split that is read from it, or an output that cannot be.
    """
    hf_dir = hf_directory(config)
    spec = load_spec(hf_dir)
    check_model_files(hf_dir, spec, family(spec.model_type))
    for mixture, split in datasets(config):
        mixture.check(split)
    check_outputs(config)


def datasets(config: TrainConfig) -> list[tuple[Mixture, str]]:
    """What the run reads, and which split of it. Raises InputError: see `Mixture.parse`."""
    train, valid = mixtures(config)
    return [(train, "train")] + ([(valid, "val")] if config.data.validates else [])


def check_outputs(config: TrainConfig) -> None:
    """Raises InputError: an output that cannot be written, or a tracker that is not installed."""
    check_trackers(config.log)
    if config.checkpoint.save is not None and (what := others(Path(config.checkpoint.save))):
        raise InputError(
            f"--save {config.checkpoint.save} is {what}; give a directory of the run's own."
        )
    if config.checkpoint.exports:
        _check_export(config.checkpoint)
    for option, given in (
        ("save", config.checkpoint.save),
        ("tensorboard-dir", config.log.tensorboard_dir),
        ("metrics-file", config.log.metrics_file),
        ("report-file", config.log.report_file),
        ("profile-dir", config.log.profile_dir),
    ):
        if given is None:
            continue
        path = Path(given)
        if option.endswith("-file"):
            if path.is_dir():
                raise InputError(f"{option} {given} is a directory; give a file.")
            path = path.absolute().parent
        check_writable(path, f"{option} {given}")


def _check_export(options: CheckpointOptions) -> None:
    """Raises InputError: SAVE/hf holds what an export must not replace."""
    target = Path(options.save) / HF
    for name in ("load", "hf_config"):
        given = getattr(options, name)
        if given is not None and Path(given).resolve().is_relative_to(target.resolve()):
            raise InputError(
                f"the export replaces {target}, which {name.replace('_', '-')} reads; give another "
                f"save."
            )
    if target.is_dir():
        free = not any(target.iterdir()) or is_hf_directory(target)
    else:
        free = not target.exists()
    if not free:
        raise InputError(
            f"the export writes {target}, where something else is; move that away, or give another "
            f"save."
        )


def mixtures(config: TrainConfig) -> tuple[Mixture, Mixture]:
    """The datasets of training and of validation. Raises InputError: see `Mixture.parse`."""
    data = config.data
    train = Mixture.parse(data.train_data_path, max_samples=data.max_samples)
    return train, Mixture.parse(data.valid_data_path or data.train_data_path)


def media_limits(config: TrainConfig) -> MediaLimits:
    """Raises InputError: see `MediaLimits`."""
    return MediaLimits(**{f.name: getattr(config.data, f.name) for f in fields(MediaLimits)})


def trained_text(config: TrainConfig) -> TrainedText:
    """Raises InputError: see `TrainedText`."""
    return TrainedText(**{f.name: getattr(config.data, f.name) for f in fields(TrainedText)})
