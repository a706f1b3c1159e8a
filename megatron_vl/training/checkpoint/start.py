"""Which checkpoint a run starts from, and whether it may; imports no Megatron-Core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_vl.errors import InputError, shown
from megatron_vl.models.common.parts import PARTS
from megatron_vl.models.registry import family
from megatron_vl.models.spec import ModelSpec
from megatron_vl.training.checkpoint.files import candidates
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.options.lora import LoraOptions, alpha_of
from megatron_vl.training.options.option import defaults
from megatron_vl.weights.convert import inspect_weights, open_weights
from megatron_vl.weights.hub import local_model
from megatron_vl.weights.mcore_io import CheckpointInfo, check_whole, inspect_checkpoint

# Options of a run that its checkpoint goes on with.
SCHEDULE = ("lr", "min_lr", "vit_lr", "merger_lr", "lr_decay_style", "lr_warmup_iters",
            "lr_decay_iters", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps",
            "lora_lr_ratio")
# What the weights in a checkpoint are, where an adapter is trained.
ADAPTER = ("lora_rank", "lora_alpha", "use_rslora", "lora_target", "lora_fused", "adapter",
           "quantize_base", "train_vit", "train_merger", "save_base")


def find_checkpoint(
    config: TrainConfig, spec: ModelSpec, damaged: dict[Path, str] | None = None
) -> tuple[CheckpointInfo | None, bool]:
    """What to start from, and whether it is this run's own: SAVE if it holds one, else LOAD.

    Args:
        damaged: checkpoints of SAVE that cannot be used, and why; gets those found so here.

    Raises:
        InputError: LOAD holds no checkpoint, or one that cannot be used with these options; or all
            of SAVE's are damaged.
    """
    info, own = source_of(config, damaged)
    if info is None:
        return None, False
    if not own:
        check_whole(info)
    if not weights_alone(config, info, own):
        if not own and config.lora.given:
            raise InputError(
                f"{info.path} holds the optimizer state of a run that trained all weights, and "
                f"this run trains an adapter; add --finetune to take the weights alone."
            )
        _check_options(config, info)
    return _checked(spec, info), own


def with_local_models(config: TrainConfig, *, weights: bool = True) -> TrainConfig:
    """The options with directories instead of models' names on a hub: see `local_model`.

    A name that is not read, as by a resumed run, stays as it is.

    Args:
        weights: whether the run is to start; a look at it needs config.json alone.

    Raises:
        InputError: a name that leads nowhere; or none of SAVE's checkpoints can be used.
    """
    options, found = config.checkpoint, {}
    if options.hf_config is not None:
        found["hf_config"] = str(local_model(options.hf_config, weights=False))
    load = options.load
    if load is not None and not Path(load).exists() and (
        hf_directory(config) == Path(load) or (weights and needs_load(config))
    ):
        found["load"] = str(local_model(load, weights=weights))
    return replace(config, checkpoint=replace(options, **found))


def check_weights(
    config: TrainConfig, spec: ModelSpec, info: CheckpointInfo | None, own: bool
) -> None:
    """Look at the names and shapes of the weights that a run is to take from `info`.

    Raises:
        InputError: gaps, surpluses, other shapes, unreadable files.
    """
    if info is not None and weights_alone(config, info, own):
        open_weights(info, family(spec.model_type).weight_map(spec))


def needs_load(config: TrainConfig) -> bool:
    """Whether `load` is given and read: SAVE holds no checkpoint to go on from instead, or one of
    an adapter alone.

    Raises:
        InputError: none of SAVE's checkpoints can be used.
    """
    beside = config.lora.given and not config.lora.save_base
    return config.checkpoint.load is not None and (beside or not goes_on(config))


def goes_on(config: TrainConfig) -> bool:
    """Whether SAVE holds a checkpoint to go on from.

    Raises:
        InputError: none of SAVE's checkpoints can be used.
    """
    return _own(config, {}) is not None


def hf_directory(config: TrainConfig) -> Path | None:
    """The directory of config.json and the tokenizer; None where nothing says it.

    That of a run that goes on from SAVE is SAVE, which has its own copy, unless hf-config is given.

    Raises:
        InputError: none of SAVE's checkpoints can be used.
    """
    options = config.checkpoint
    own = (options.save is not None and (Path(options.save) / "config.json").is_file()
           and goes_on(config))
    found = options.hf_config or (options.save if own else options.load or options.save)
    return None if found is None else Path(found)


def source_of(
    config: TrainConfig, damaged: dict[Path, str] | None = None
) -> tuple[CheckpointInfo | None, bool]:
    """What SAVE holds, else what `load` does; and whether it is SAVE's."""
    info = _own(config, {} if damaged is None else damaged)
    if info is not None:
        return info, True
    load = config.checkpoint.load
    return (None if load is None else inspect_weights(load)), False


def _own(config: TrainConfig, damaged: dict[Path, str]) -> CheckpointInfo | None:
    """The checkpoint of SAVE to go on from; None if it holds none.

    Raises:
        InputError: none of them can be used.
    """
    if config.checkpoint.save is None:
        return None
    for path in candidates(Path(config.checkpoint.save)):
        if path in damaged:
            continue
        try:
            return inspect_checkpoint(path)
        except InputError as error:
            damaged[path] = str(error).rstrip(".")
    if damaged:
        raise InputError(
            f"no checkpoint of {config.checkpoint.save} can be used: "
            + "; ".join(f"{path.name}: {fault}" for path, fault in damaged.items())
            + "; restore one of them, or give another --save."
        )
    return None


def weights_alone(config: TrainConfig, info: CheckpointInfo, own: bool) -> bool:
    """Whether a run takes nothing but the weights of `info`, which any layout then may have."""
    return info.format != "torch_dist" or info.release or (config.checkpoint.finetune and not own)


def _check_options(config: TrainConfig, info: CheckpointInfo) -> None:
    """A resumed run keeps its kind of optimizer and, unless told otherwise, its schedule.

    Its length may change, and with it the schedule's end and a warmup that is a share of it.
    """
    saved, here, usual = dict(info.args), config.resolved(), defaults(LoraOptions)
    follows = []
    if saved.get("lr_decay_iters") is None and here["lr_decay_iters"] is None:
        follows.append("lr_decay_iters")
    share = here["lr_warmup_fraction"]
    if follows and share is not None and saved.get("lr_warmup_fraction") == share:
        follows.append("lr_warmup_iters")
    for options in (saved, here):  # what being left out means
        for name, meant in (("lr_decay_iters", "train_iters"), ("vit_lr", "lr"),
                            ("merger_lr", "lr")):
            if options.get(name) is None and meant in options:
                options[name] = options[meant]
        if options.get("lora_rank") is not None:
            options["lora_alpha"] = alpha_of(options["lora_rank"], options["lora_alpha"])
        if options.get("lr_warmup_fraction") is not None:
            options["lr_warmup_iters"] = round(
                options["lr_warmup_fraction"] * options["lr_decay_iters"]
            )
        for name in ("train_constants", *(f"freeze_{part}" for part in PARTS)):
            options.setdefault(name, False)
    if not config.optimizer.override_opt_param_scheduler:
        for name in (name for name in SCHEDULE if name not in follows):
            if name in saved and saved[name] != here[name]:
                raise InputError(
                    f"{info.path} was trained with {_flag(name)} {saved[name]} but this run has "
                    f"{here[name]}; give the old value, or --override-opt-param-scheduler to take "
                    f"the new one."
                )
    for name in ADAPTER:
        if saved.get(name, usual[name]) != here[name]:
            raise InputError(
                f"{info.path} was trained with {_flag(name)} {shown(saved.get(name, usual[name]))} "
                f"but this run has {shown(here[name])}; give the old value, or another --save."
            )
    if config.checkpoint.no_load_optim:
        return
    # State is of what is trained, laid out by the kind of optimizer and, where it is not sharded,
    # by precision.
    sharded = here["use_distributed_optimizer"]
    for name in ("use_distributed_optimizer", "train_constants",
                 *(f"freeze_{part}" for part in PARTS),
                 *(() if sharded else ("bf16", "fp16"))):
        if name in saved and saved[name] != here[name]:
            raise InputError(
                f"{info.path} holds the optimizer state of a run with {_flag(name)} "
                f"{str(saved[name]).lower()} but this run has {str(here[name]).lower()}; give the "
                f"old value, or --no-load-optim to start the optimizer anew."
            )


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _checked(spec: ModelSpec, info: CheckpointInfo) -> CheckpointInfo:
    if info.model_type not in (None, spec.model_type):
        raise InputError(
            f"{info.path} holds a {info.model_type} model but config.json says "
            f"{spec.model_type}; give the checkpoint converted from it."
        )
    return info
