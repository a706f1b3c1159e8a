"""A training run's options as one frozen whole, and how values become it."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_vl.errors import InputError, shown
from megatron_vl.models.common.parts import PARTS
from megatron_vl.training.options.groups import (
    GROUPS,
    BatchOptions,
    CheckpointOptions,
    DataOptions,
    ExpertsOptions,
    FaultOptions,
    LogOptions,
    LoraOptions,
    ModelRunOptions,
    OffloadOptions,
    OptimizerOptions,
    ParallelOptions,
    TpOverlapOptions,
)
from megatron_vl.training.options.spellings import answer, key_of

LISTS = ("pp-layers", "vit-pp-layers")  # that a YAML file may write as lists
LENGTHS = ("train_samples", "num_train_epochs")  # options that stand for train-iters
NAMES = {str: "text", int: "whole number", float: "number"}  # of the types of values
DATASETS = ("train-data-path", "valid-data-path")  # of which one text may name several


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run."""

    parallel: ParallelOptions
    tp_overlap: TpOverlapOptions
    batch: BatchOptions
    optimizer: OptimizerOptions
    model: ModelRunOptions
    offload: OffloadOptions
    lora: LoraOptions
    experts: ExpertsOptions
    data: DataOptions
    checkpoint: CheckpointOptions
    fault: FaultOptions
    log: LogOptions

    def __post_init__(self) -> None:
        # What epochs come to in steps is not known yet: see `with_steps`.
        if self.batch.num_train_epochs is None:
            self.check_warmup()
        for name in ("exit_interval", "exit_duration_in_mins"):
            if getattr(self.batch, name) is not None and self.checkpoint.save is None:
                raise InputError(
                    f"{name.replace('_', '-')} ends a start whose steps another goes on from, and "
                    f"there is no save to keep them; give save."
                )
        for name in ("save_best", "early_stop"):
            if self.resolved()[name] is not None and not self.data.validates:
                off = "eval-iters" if self.data.eval_interval else "eval-interval"
                raise InputError(
                    f"{name.replace('_', '-')} compares validations, and {off} 0 means that there "
                    f"are none; leave out one of them."
                )
        if self.checkpoint.save_best is not None and self.checkpoint.save is None:
            raise InputError(
                "save-best keeps a checkpoint, and there is no save to keep it in; give save."
            )
        # Where no option says the precision, it is looked at again when config.json has.
        if self.optimizer.grad_reduce_in_bf16 and self.model.dtype not in (None, "bfloat16"):
            raise InputError(
                f"grad-reduce-in-bf16 is for bf16 training and this is {self.model.dtype}; add "
                f"bf16, or leave it out."
            )
        self.offload.check(
            cpu_offloading=self.model.cpu_offloading, recompute=self.model.recompute_granularity)
        for part in self.frozen:
            if getattr(self.optimizer, f"{part}_lr", None) is not None:
                raise InputError(
                    f"{part}-lr is given but {self.freezes(part)} keeps the {PARTS[part]} from "
                    f"being trained; leave out one of them."
                )
        if self.lora.given:
            self._check_lora()

    def _check_lora(self) -> None:
        """Raises InputError: a part is both to be trained and not, or its layers cannot be had."""
        for part in PARTS:
            if getattr(self.lora, f"train_{part}", False) and part in self.model.frozen:
                raise InputError(
                    f"train-{part} and freeze-{part} exclude one another; leave out one of them."
                )
        if self.lora.quantize_base is None:
            return
        for name in ("fp8_format", "cpu_offloading"):
            if getattr(self.model, name):
                raise InputError(
                    f"{name.replace('_', '-')} needs layers of TransformerEngine's, which cannot "
                    f"read the weights of quantize-base; leave out one of them."
                )

    @property
    def frozen(self) -> tuple[str, ...]:
        """Keys of PARTS whose own weights are not trained."""
        if not self.lora.given:
            return self.model.frozen
        return tuple(part for part in PARTS if not getattr(self.lora, f"train_{part}", False))

    def freezes(self, part: str) -> str:
        """The option that keeps a part's own weights from being trained."""
        if part in self.model.frozen:
            return f"freeze-{part}"
        return "lora-rank" if self.lora.adapter is None else "adapter"

    def check_warmup(self) -> None:
        """Raises InputError: the warmup is as long as the schedule."""
        if self.warmup_iters >= self.decay_iters:
            raise InputError(
                f"lr-warmup-iters {self.warmup_iters} must be fewer than the "
                f"{self.decay_iters} steps of the learning-rate schedule; lower it or raise "
                f"{self.length_option}."
            )

    @property
    def decay_iters(self) -> int:
        """Steps of the learning-rate schedule."""
        chosen = self.optimizer.lr_decay_iters
        return self.batch.train_iters if chosen is None else chosen

    @property
    def warmup_iters(self) -> int:
        """Steps of the learning rate's way up."""
        share = self.optimizer.lr_warmup_fraction
        return self.optimizer.lr_warmup_iters if share is None else round(share * self.decay_iters)

    @property
    def length_option(self) -> str:
        """The option that says how long the run is."""
        chosen = [name for name in LENGTHS if getattr(self.batch, name) is not None]
        return chosen[0].replace("_", "-") if chosen else "train-iters"

    @property
    def hang_seconds(self) -> float:
        """Seconds without progress until the run is given up; 0: never."""
        # Before the collectives' own timeout, which says nothing of where the ranks stand.
        chosen, minutes = self.fault.hang_timeout, self.parallel.distributed_timeout_minutes
        return 0.9 * 60 * minutes if chosen is None else chosen

    @property
    def stacks_dir(self) -> Path:
        """Where the ranks of a run that hangs write where they are."""
        if self.checkpoint.save is not None:
            return Path(self.checkpoint.save) / "stacks"
        metrics = self.log.metrics_file
        return (Path(metrics).parent if metrics is not None else Path()) / "stacks"

    def to_dict(self) -> dict[str, Any]:
        """Every option under its flag's name with underscores.

        Without `train_iters` where another option gives the run's length.
        """
        return {
            name: value for name, value in self.resolved().items()
            if name != "train_iters" or self.length_option == "train-iters"
        }

    def resolved(self) -> dict[str, Any]:
        """The same with the steps that the run's length comes to."""
        return {
            f.name: getattr(getattr(self, name), f.name)
            for name, group in GROUPS.items()
            for f in fields(group)
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; absent options take their default.

        Raises:
            InputError: an unknown option (with what is meant by it), a value of a wrong type, or
                one option by two of its names.
        """
        values, given = {}, values
        for word, value in given.items():
            key = key_of(word)
            if key in values:
                raise InputError(
                    f"{key.replace('_', '-')} is given as {word.replace('_', '-')} too; keep one "
                    f"of them."
                )
            values[key] = value
        known = {f.name: (name, f) for name, group in GROUPS.items() for f in fields(group)}
        chosen: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
        for key, value in values.items():
            if key not in known:
                near = difflib.get_close_matches(key.lower()[:80], known, n=1)
                mend = f"did you mean {near[0]}?" if near else "see megatron-vl train --help."
                says = answer(key)
                raise InputError(
                    f"option {shown(repr(key))} is unknown; {f'{says}.' if says else mend}"
                )
            group, f = known[key]
            chosen[group][key] = _typed(f, value)
        lengths = [name for name in ("train_iters", *LENGTHS) if values.get(name) is not None]
        if len(lengths) > 1:
            raise InputError(
                f"{' and '.join(name.replace('_', '-') for name in lengths)} all say how long the "
                f"run is; give one of them."
            )
        groups = {name: GROUPS[name](**options) for name, options in chosen.items()}
        batch = groups["batch"]
        if batch.train_samples is not None:
            steps = batch.train_samples // batch.global_batch_size
            if steps == 0:
                raise InputError(
                    f"train-samples {batch.train_samples} are fewer than the "
                    f"{batch.global_batch_size} rows of one step (global-batch-size); give more."
                )
            groups["batch"] = replace(batch, train_iters=steps)
        return cls(**groups)


def kind_of(f: Field) -> type:
    """The type of an option's value, where it is not None."""
    return f.metadata["kind"] or type(f.default)


def _typed(f, value):
    kind, name = kind_of(f), f.name.replace("_", "-")
    if value is None and f.default is None:
        return None
    if isinstance(f.default, tuple):  # one or several, in YAML `0` or `[0, 1]`
        several = value if isinstance(value, (list, tuple)) else [value]
        if not several and f.default:
            raise InputError(f"option {name} is empty; give at least one {NAMES[kind]}.")
        return tuple(_value(f, one, kind, name) for one in several)
    return _value(f, value, kind, name)


def _value(f, value, kind: type, name: str):
    refused = f"option {name} is {shown(repr(value))}"
    if kind is bool and not isinstance(value, bool):
        raise InputError(f"{refused}; give true or false.")
    if name in LISTS and isinstance(value, list):
        value = json.dumps(value, default=str)  # YAML has dates too
    if isinstance(value, (list, tuple, dict, set, bytes)) or (kind is str and value is None):
        several = ", several datasets as A,B" if name in DATASETS else ""
        raise InputError(f"{refused}; give one {NAMES[kind]}{several}.")
    # YAML reads 1.10 and 007 as numbers, which are other texts.
    if kind is str and not isinstance(value, str):
        raise InputError(f"{refused}; give a text, in quotes.")
    if isinstance(value, bool) and kind is not bool:
        raise InputError(f"{refused}; give a {NAMES[kind]}.")
    if kind is str and not value.strip():
        raise InputError(f"option {name} is empty; give a text, or leave it out.")
    try:
        typed = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{refused}; give a {NAMES[kind]}.") from None
    if kind is float and math.isinf(typed):
        raise InputError(f"{refused}; give a finite number.")
    if kind is int and isinstance(value, float) and typed != value:
        raise InputError(f"{refused}; give a whole number.")
    if f.metadata["choices"] and typed not in f.metadata["choices"]:
        raise InputError(f"{refused}; use one of {', '.join(f.metadata['choices'])}.")
    return typed
