"""Flags of transformers' Trainer, as published fine-tuning scripts take them, and what each becomes
here. Pure Python.

A flag that is not given has the default of the model's own script, else the Trainer's, not ours: a
recipe relies on it. What depends on the data is in `hf_run`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vl.errors import InputError, shown
from megatron_vl.training.options.spellings import ANSWERS
from megatron_vl.typed import read_file

SAME = {  # flag -> the option that says the same
    "model_name_or_path": "load",
    "model_max_length": "seq-length",
    "per_device_train_batch_size": "micro-batch-size",
    "learning_rate": "lr",
    "weight_decay": "weight-decay",
    "adam_beta1": "adam-beta1",
    "adam_beta2": "adam-beta2",
    "adam_epsilon": "adam-eps",
    "max_grad_norm": "clip-grad",
    "save_total_limit": "save-total-limit",
    "dataloader_num_workers": "num-workers",
    "seed": "seed",
}
DEFAULTS = {  # the Trainer's
    "per_device_train_batch_size": "8",
    "gradient_accumulation_steps": "1",
    "num_train_epochs": "3",
    "max_steps": "-1",
    "learning_rate": "5e-5",
    "lr_scheduler_type": "linear",
    "weight_decay": "0",
    "adam_beta1": "0.9",
    "adam_beta2": "0.999",
    "adam_epsilon": "1e-8",
    "max_grad_norm": "1",
    "logging_steps": "500",
    "save_strategy": "steps",
    "save_steps": "500",
    "seed": "42",
}
LORA_DEFAULTS = {  # PEFT's; it has none for the layers
    "lora_r": "8",
    "lora_alpha": "8",
    "lora_dropout": "0",
    "lora_target_modules": "all-linear",
}
LORA = {  # flag, which counts with use_lora -> the same
    "lora_r": "lora-rank",
    "lora_alpha": "lora-alpha",
    "lora_dropout": "lora-dropout",
    "lora_target_modules": "lora-target",
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
    "cache_dir": "a model's name is looked up in the hubs' own caches, which HF_HOME moves",
    "optim": "the optimizer is AdamW",
    "remove_unused_columns": "data are prepared before",
    "lazy_preprocess": "data are prepared before",
    "evaluation_strategy": "data_path has nothing to validate on",
    "eval_strategy": "data_path has nothing to validate on",
    "load_best_model_at_end": "data_path has nothing to validate on",
    "metric_for_best_model": "data_path has nothing to validate on",
    "greater_is_better": "data_path has nothing to validate on",
    "per_device_eval_batch_size": "data_path has nothing to validate on",
    "ddp_find_unused_parameters": "every parameter has a gradient",
    "report_to": "the run's numbers go to metrics.jsonl and report.html beside its checkpoints",
}
OTHERS = (  # flags that are read by name
    "data_path", "output_dir", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "warmup_ratio", "warmup_steps", "lr_scheduler_type", "logging_steps", "save_strategy",
    "save_steps", "use_lora", "q_lora", "deepspeed",
)
FLAGS = (*SAME, *LORA, *SWITCHES, *IGNORED, *OTHERS)
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
AGREEING = {  # DeepSpeed's key -> the flag that says the same
    "gradient_clipping": "max_grad_norm",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
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

    flags: Mapping[str, str | None]  # every flag's value, its default where it was not given
    typed: frozenset[str]  # flags that were given
    words: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    called: dict[str, str] = field(  # option -> the flag that says it
        default_factory=lambda: {option: f"--{flag}" for flag, option in SAME.items()}
    )

    def add(self, flag: str, *words: str) -> None:
        """`flag` becomes `words`, an option's first."""
        self.words += words
        self.tell(flag, f"-> {' '.join(words)}")
        self.called[words[0].removeprefix("--")] = f"--{flag}"

    def ignore(self, flag: str, why: str) -> None:
        if flag in self.typed:
            self.tell(flag, f"is ignored: {why}")

    def tell(self, flag: str, what: str) -> None:
        default = "" if flag in self.typed else " (default)"
        self.told.append(f"--{flag} {self.flags[flag]} {what}{default}")

    def number(self, flag: str) -> float:
        """Its value; 0 where it has none. Raises InputError: it is no finite number."""
        value = self.flags[flag] or "0"
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"--{flag} is {shown(repr(value))}; it must be a number.")
        return number


def translate(
    given: Mapping[str, str | None], own_defaults: Mapping[str, str] | None = None
) -> Translation:
    """The options that flags come to, but for what `hf_run` says of them.

    Args:
        given: the values of FLAGS as they were typed, None where one was not.
        own_defaults: of flags of the model's own script, instead of DEFAULTS.

    Raises:
        InputError: a value that cannot be used, or that asks for what is not here.
    """
    typed = {flag: value for flag, value in given.items() if value is not None}
    made = Translation(
        flags=dict.fromkeys(FLAGS) | DEFAULTS | LORA_DEFAULTS | dict(own_defaults or {}) | typed,
        typed=frozenset(typed),
    )
    flags = made.flags
    if flags["q_lora"] and _truth("q_lora", flags["q_lora"]):
        raise InputError(
            f"--q_lora is {flags['q_lora']}, but {ANSWERS['qlora']}; give -- --quantize-base nf4 "
            f"behind the other flags in its place."
        )
    for flag, option in SAME.items():
        if flags[flag] is not None:
            made.add(flag, f"--{option}", flags[flag])
    for flag, words in SWITCHES.items():
        if flags[flag] and _truth(flag, flags[flag]):
            made.add(flag, *words)
    _lora(made)
    _length(made)
    _schedule(made)
    made.words += ["--packing-buffer-size", "0"]
    made.told.append("a row holds one sample: --packing-buffer-size 0")
    if flags["deepspeed"]:
        _deepspeed(flags["deepspeed"], made)
    if "--use-distributed-optimizer" not in made.words:
        made.words.append("--no-use-distributed-optimizer")
    for flag, why in IGNORED.items():
        made.ignore(flag, why)
    return made


def _lora(made: Translation) -> None:
    uses = made.flags["use_lora"]
    if uses and _truth("use_lora", uses):
        made.tell("use_lora", "trains an adapter; embedding and head stay as they are")
        for flag, option in LORA.items():
            made.add(flag, f"--{option}", *made.flags[flag].split())
        return
    for flag in LORA:
        made.ignore(flag, "--use_lora is not True")


def _length(made: Translation) -> None:
    """A negative number of steps is none: epochs count."""
    if made.number("max_steps") < 0:
        made.add("num_train_epochs", "--num-train-epochs", made.flags["num_train_epochs"])
        made.ignore("max_steps", "--num_train_epochs says how long the run is")
    else:
        made.add("max_steps", "--train-iters", made.flags["max_steps"])
        made.ignore("num_train_epochs", "--max_steps says how long the run is")


def _schedule(made: Translation) -> None:
    """The learning rate's; of two ways to say its warm-up, steps count unless they are 0."""
    flags = made.flags
    style = flags["lr_scheduler_type"]
    if style not in SCHEDULES:
        raise InputError(
            f"--lr_scheduler_type is {shown(repr(style))}; use one of {', '.join(SCHEDULES)}."
        )
    made.add("lr_scheduler_type", "--lr-decay-style", SCHEDULES[style], "--min-lr", "0")
    steps, _ = made.number("warmup_steps"), made.number("warmup_ratio")
    if style == "constant":
        for flag in ("warmup_ratio", "warmup_steps"):
            made.ignore(flag, "the Trainer's constant schedule has no warm-up; use "
                              "constant_with_warmup for one")
    elif steps or flags["warmup_ratio"] is None:
        made.ignore("warmup_ratio", "--warmup_steps says how long the warm-up is")
        if 0 < steps < 1:  # a share of the run, as of transformers 5
            made.add("warmup_steps", "--lr-warmup-fraction", flags["warmup_steps"])
        elif steps:
            made.add("warmup_steps", "--lr-warmup-iters", str(int(steps)))
    else:
        made.ignore("warmup_steps", "--warmup_ratio says how long the warm-up is")
        made.add("warmup_ratio", "--lr-warmup-fraction", flags["warmup_ratio"])


def _truth(flag: str, value: str) -> bool:
    if value.lower() not in TRUTH:
        raise InputError(f"--{flag} is {shown(repr(value))}; use True or False.")
    return TRUTH[value.lower()]


def _deepspeed(path: str, made: Translation) -> None:
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
    for name, flag in AGREEING.items():
        value, said = config.pop(name, "auto"), made.flags[flag]
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
