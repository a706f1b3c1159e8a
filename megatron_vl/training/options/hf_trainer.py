"""Flags of transformers' Trainer, as published fine-tuning scripts take them, and what each becomes
here. Pure Python.

A flag that is not given has the Trainer's own default, not ours: a recipe relies on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vl.errors import InputError, shown
from megatron_vl.training.options.spellings import ANSWERS
from megatron_vl.typed import read_file

SAME = {  # flag -> the option that says the same, and the Trainer's default
    "model_name_or_path": ("load", None),
    "model_max_length": ("seq-length", "512"),
    "per_device_train_batch_size": ("micro-batch-size", "8"),
    "num_train_epochs": ("num-train-epochs", "3"),
    "max_steps": ("train-iters", None),
    "learning_rate": ("lr", "5e-5"),
    "weight_decay": ("weight-decay", "0"),
    "adam_beta1": ("adam-beta1", "0.9"),
    "adam_beta2": ("adam-beta2", "0.999"),
    "adam_epsilon": ("adam-eps", "1e-8"),
    "max_grad_norm": ("clip-grad", "1"),
    "warmup_ratio": ("lr-warmup-fraction", None),
    "warmup_steps": ("lr-warmup-iters", None),
    "logging_steps": ("log-interval", "500"),
    "save_total_limit": ("save-total-limit", None),
    "dataloader_num_workers": ("num-workers", None),
    "seed": ("seed", "42"),
}
SWITCHES = {  # flag -> the options that True becomes
    "bf16": ("--bf16",),
    "fp16": ("--fp16",),
    "gradient_checkpointing": ("--recompute-granularity", "full"),
    "fix_vit": ("--freeze-vit",),
}
SCHEDULES = {  # lr_scheduler_type -> lr-decay-style
    "linear": "linear", "cosine": "cosine", "constant": "constant",
    "constant_with_warmup": "constant",
}
IGNORED = {  # flag -> why nothing becomes of it
    "tf32": "products of fp32 are computed as torch is set up",
    "cache_dir": "nothing is downloaded",
    "optim": "the optimizer is AdamW",
    "remove_unused_columns": "data are prepared before",
    "lazy_preprocess": "data are prepared before",
    "evaluation_strategy": "data_path has nothing to validate on",
    "per_device_eval_batch_size": "data_path has nothing to validate on",
    "ddp_find_unused_parameters": "every parameter has a gradient",
    "report_to": "the run's numbers go to metrics.jsonl and report.html beside its checkpoints",
}
OTHERS = (  # flags that are read by name
    "data_path", "output_dir", "gradient_accumulation_steps", "lr_scheduler_type",
    "save_strategy", "save_steps", "use_lora", "q_lora", "deepspeed",
)
FLAGS = (*SAME, *SWITCHES, *IGNORED, *OTHERS)
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
AGREEING = (  # DeepSpeed's key, the flag that says the same, and the flag's default
    ("gradient_clipping", "max_grad_norm", "1"),
    ("train_micro_batch_size_per_gpu", "per_device_train_batch_size", "8"),
    ("gradient_accumulation_steps", "gradient_accumulation_steps", "1"),
)
STAGES = {  # of ZeRO -> what is told of it
    0: "",
    1: "ZeRO 1 is --use-distributed-optimizer",
    2: "ZeRO 2 becomes --use-distributed-optimizer, which shares the optimizer's state; gradients "
       "stay whole on every rank",
    3: "ZeRO 3 becomes --use-distributed-optimizer, which shares the optimizer's state; --tp and "
       "--pp, not ZeRO, cut weights and gradients",
}


@dataclass(kw_only=True, slots=True)
class Translation:
    """Options of `megatron-vl train`, and what is to be told of them."""

    words: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    called: dict[str, str] = field(default_factory=dict)  # option -> the flag that was typed

    def add(self, flag: str, value: str, *words: str) -> None:
        self.words += words
        self.told.append(f"--{flag} {value} -> {' '.join(words)}")
        self.called[words[0].removeprefix("--")] = f"--{flag}"


def translate(flags: Mapping[str, str | None]) -> Translation:
    """The options that `flags` come to, but for data, batch and saving.

    Args:
        flags: the values of FLAGS as they were typed, None where one was not.

    Raises:
        InputError: a value that cannot be used, or that asks for what is not here.
    """
    made = Translation()
    for flag in ("use_lora", "q_lora"):
        if flags[flag] and _truth(flag, flags[flag]):
            raise InputError(f"--{flag} is {flags[flag]}, but {ANSWERS['lora']}; leave it out.")
    counted = "num_train_epochs" if flags["max_steps"] else "max_steps"
    for flag, (option, default) in SAME.items():
        value = flags[flag] or default
        if value is not None and flag != counted:
            made.add(flag, value, f"--{option}", value)
    for flag, words in SWITCHES.items():
        if flags[flag] and _truth(flag, flags[flag]):
            made.add(flag, flags[flag], *words)
    schedule = flags["lr_scheduler_type"] or "linear"
    if schedule not in SCHEDULES:
        raise InputError(f"--lr_scheduler_type is {shown(repr(schedule))}; use one of "
                         f"{', '.join(SCHEDULES)}.")
    made.add("lr_scheduler_type", schedule, "--lr-decay-style", SCHEDULES[schedule],
             "--min-lr", "0")
    if flags["deepspeed"]:
        _deepspeed(flags["deepspeed"], flags, made)
    made.told += [f"--{flag} {flags[flag]} is ignored: {why}" for flag, why in IGNORED.items()
                  if flags[flag]]
    return made


def _truth(flag: str, value: str) -> bool:
    if value.lower() not in TRUTH:
        raise InputError(f"--{flag} is {shown(repr(value))}; use True or False.")
    return TRUTH[value.lower()]


def _deepspeed(path: str, flags: Mapping[str, str | None], made: Translation) -> None:
    """What DeepSpeed's configuration asks for, as far as the flags do not say it."""
    config = read_file(Path(path), dict, mend="give DeepSpeed's own JSON file")
    zero = _table(path, config, "zero_optimization")
    stage = zero.pop("stage", 0)
    if not isinstance(stage, int) or stage not in STAGES:
        raise InputError(f"{path}: zero_optimization.stage is {shown(stage)}; use 0, 1, 2 or 3.")
    if stage:
        made.words.append("--use-distributed-optimizer")
        made.told.append(f"--deepspeed {path}: {STAGES[stage]}")
    if _table(path, zero, "offload_optimizer").get("device") in ("cpu", "nvme"):
        made.words.append("--optimizer-cpu-offload")
        made.told.append(f"--deepspeed {path}: offload_optimizer becomes --optimizer-cpu-offload")
        del zero["offload_optimizer"]
    for name, flag in (("bf16", "--bf16"), ("fp16", "--fp16")):
        if _table(path, config, name).get("enabled") is True and flag not in made.words:
            made.words.append(flag)
            made.told.append(f"--deepspeed {path}: {name} becomes {flag}")
        config.pop(name, None)
    for name, flag, default in AGREEING:
        value, said = config.pop(name, "auto"), flags[flag] or default
        if value != "auto" and not _equal(value, said):
            raise InputError(f"{path}: {name} is {shown(value)}, but --{flag} is {said}; make them "
                             f"equal, or write \"auto\".")
    config.pop("zero_optimization", None)
    left = [name for name, value in (*config.items(), *zero.items()) if value != "auto"]
    if left:
        made.told.append(f"--deepspeed {path}: ignored, as there is no DeepSpeed here: "
                         f"{', '.join(left)}")


def _equal(value: object, said: str) -> bool:
    try:
        return float(value) == float(said)
    except (TypeError, ValueError):  # one of them is no number
        return False


def _table(path: str, config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name, {})
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} is {shown(value)}; it must be a table.")
    return value
