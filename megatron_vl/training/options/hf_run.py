"""What flags of transformers' Trainer mean for a run whose processes, model and data are known: the
defaults of the model's own script, where its data are, the rows of a step, when it saves and logs.

`hf_trainer` says what each flag becomes by itself.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.models.registry import family, load_spec
from megatron_vl.training.epochs import steps_of, with_steps
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.options.hf_trainer import Translation
from megatron_vl.weights.files import fingerprint

NEVER = 10**9  # steps
WHEN_PREPARED = "once the data are prepared"


def script_defaults(hf_dir: Path) -> dict[str, str]:
    """Flags whose defaults are those of the fine-tuning script of this model's family.

    Raises:
        InputError: the model's config.json cannot be used.
    """
    return family(load_spec(hf_dir).model_type).finetune_defaults()


def data_directory(given: Path, output: Path) -> Path:
    """A prepared dataset as it is; of a file, where it is prepared: another file, another place.

    Raises:
        InputError: `given` is neither.
    """
    if given.is_file():
        return output / f"data-{fingerprint(given).split()[-1]}"
    if not (given / ".nv-meta").is_dir():
        raise InputError(
            f"--data_path {given} is neither a JSON file nor a dataset that megatron-vl prepare "
            f"made; give one of them."
        )
    return given


def preparation(given: Path, data: Path, data_format: str, *, nnodes: int) -> list[str]:
    """The command that makes `data` of `given`; empty where it is there.

    Raises:
        InputError: several nodes would prepare it at once.
    """
    if data.exists():
        return []
    settings = ["--format", data_format, "--split", "1,0,0"]
    if nnodes > 1:
        mend = shlex.join(["megatron-vl", "prepare", str(given), "DIR", *settings])
        raise InputError(
            f"--data_path {given} is raw data, which {nnodes} nodes would prepare at once; run "
            f"{mend} on one of them, DIR being on storage that all can read, and give --data_path "
            f"DIR."
        )
    return ["prepare", str(given), str(data), *settings]


def set_batch(made: Translation, replicas: int) -> None:
    """The rows of a step, of as many data-parallel ranks as there are.

    Raises:
        InputError: a flag that is no whole number above 0.
    """
    flags = ("per_device_train_batch_size", "gradient_accumulation_steps")
    batch = replicas * math.prod(_whole(made, flag) for flag in flags)
    made.words += ["--global-batch-size", str(batch)]
    made.told.append(f"rows of a step, over all processes -> --global-batch-size {batch}")


def set_intervals(made: Translation, config: TrainConfig, *, prepared: bool) -> None:
    """When the run saves and logs; the last step always is saved.

    Args:
        config: the run's, without these intervals.
        prepared: whether its data can be counted.

    Raises:
        InputError: a flag that cannot be used.
    """
    strategy = made.flags["save_strategy"]
    if strategy not in ("no", "steps", "epoch"):
        raise InputError(f"--save_strategy is {strategy!r}; use no, steps or epoch.")
    if strategy == "no":
        made.add("save_strategy", "--save-interval", str(NEVER))
        made.ignore("save_steps", "--save_strategy is no")
    elif strategy == "epoch":
        made.ignore("save_steps", "--save_strategy is epoch")
        if prepared:
            made.add("save_strategy", "--save-interval", str(steps_of(config, 1)))
        else:
            made.tell("save_strategy", f"-> --save-interval, {WHEN_PREPARED}")
    else:
        _set_interval(made, "save_steps", "--save-interval", config, prepared=prepared)
    _set_interval(made, "logging_steps", "--log-interval", config, prepared=prepared)


def _set_interval(
    made: Translation, flag: str, option: str, config: TrainConfig, *, prepared: bool
) -> None:
    value = made.number(flag)
    if value <= 0 or (value > 1 and not value.is_integer()):
        raise InputError(
            f"--{flag} is {made.flags[flag]!r}; it must be a whole number of steps, or a share of "
            f"the run's steps between 0 and 1."
        )
    if value >= 1:
        made.add(flag, option, str(int(value)))
    elif prepared or config.batch.num_train_epochs is None:
        steps = with_steps(config).batch.train_iters
        made.add(flag, option, str(math.ceil(value * steps)))
    else:
        made.tell(flag, f"-> {option}, {WHEN_PREPARED}")


def _whole(made: Translation, flag: str) -> int:
    value = made.number(flag)
    if value < 1 or not value.is_integer():
        raise InputError(
            f"--{flag} is {made.flags[flag]!r}; it must be a whole number above 0."
        )
    return int(value)
