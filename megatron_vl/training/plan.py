"""What a run is, found out before any process group or model exists; imports no Megatron-Core."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_vl.data.encode.model_files import check_model_files
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.options import TrainedText
from megatron_vl.errors import InputError
from megatron_vl.models.common.parts import PARTS
from megatron_vl.models.common.recompute import Recompute, recompute_of
from megatron_vl.models.media import MediaLimits
from megatron_vl.models.registry import family, load_spec
from megatron_vl.models.spec import VLMSpec
from megatron_vl.parallel import Layout, StageSplit
from megatron_vl.parallel.stages import layer_list
from megatron_vl.training.checkpoint.files import candidates
from megatron_vl.training.checkpoint.same_model import check_same_model
from megatron_vl.training.machine import check_machine
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.options.spellings import PRECISIONS
from megatron_vl.training.reporting.history import METRICS, page_of
from megatron_vl.training.reporting.trackers import check_trackers
from megatron_vl.weights.convert import inspect_weights, open_weights
from megatron_vl.weights.found import others
from megatron_vl.weights.mcore_io import CheckpointInfo, inspect_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run is, found out before any process group or model exists."""

    config: TrainConfig
    spec: VLMSpec
    layout: Layout
    split: StageSplit
    hf_dir: Path  # config.json and tokenizer
    precision: str  # and what says it, in words
    num_microbatches: int
    recompute: Recompute  # of the language model
    vit_recompute: Recompute  # of the vision tower

    @property
    def row_length(self) -> int:
        """Tokens that a row holds: seq-length when samples are packed, else max-padding-length."""
        batch = self.config.batch
        packs = self.config.data.packing_buffer_size > 0
        return batch.seq_length if packs else batch.max_padding_length or batch.seq_length

    @property
    def row_multiple(self) -> int | None:
        """Of what the length of unpacked rows is a multiple; None: all have `row_length`."""
        if self.config.data.packing_buffer_size > 0 or not self.layout.lengths_vary:
            return None
        # Few lengths, so that kernels chosen by shape come again; 16 tokens a rank, as fp8 needs.
        return math.lcm(64, 16 * self.layout.row_parts)

    @property
    def described_length(self) -> str:
        """How long rows are, in words."""
        if self.row_multiple is None:
            return f"{self.row_length} tokens"
        return f"at most {self.row_length} tokens, no longer than a microbatch needs,"

    @property
    def metrics_file(self) -> Path | None:
        """Where the run's numbers go."""
        log, save = self.config.log, self.config.checkpoint.save
        if log.metrics_file is not None:
            return Path(log.metrics_file)
        return None if save is None else Path(save) / METRICS

    @property
    def report_file(self) -> Path | None:
        """Where the page about the run goes; None for none."""
        if not self.config.log.report or self.metrics_file is None:
            return None
        given = self.config.log.report_file
        return page_of(self.metrics_file) if given is None else Path(given)

    @property
    def profile_dir(self) -> Path | None:
        """Where traces go; None where nothing says it."""
        log = self.config.log
        given = log.profile_dir or log.tensorboard_dir
        if given is not None:
            return Path(given)
        return None if self.metrics_file is None else self.metrics_file.with_name("profile")


def plan_run(config: TrainConfig, world_size: int, *, here: bool = True) -> Plan:
    """Check a configuration against the model and the number of processes; touches no GPU.

    Args:
        here: whether this machine is to run it; if not, what it has is not asked.

    Raises:
        InputError: anything that cannot work, by name.
    """
    hf_dir, load = hf_directory(config), config.checkpoint.load
    if load is not None and not Path(load).exists() and (
        needs_load(config) or hf_dir == Path(load)
    ):
        raise InputError(
            f"--load {load} does not exist; give the directory of a Hugging Face model or of a "
            f"converted checkpoint."
        )
    if hf_dir is None:
        raise InputError(
            "the model is unknown: give --load a Hugging Face directory or a converted checkpoint, "
            "or --hf-config a directory with config.json and the tokenizer."
        )
    spec = load_spec(hf_dir)
    if load is not None and config.checkpoint.save is not None and not needs_load(config):
        check_same_model(Path(config.checkpoint.save), Path(load))
    family(spec.model_type).check_size(spec, config.checkpoint.model_size)
    if spec.vision is None:
        _check_text_only(config, spec)
    if config.model.cpu_offloading and config.parallel.pipeline_model_parallel_size > 1:
        raise InputError(
            "cpu-offloading needs a pipeline of one stage; use "
            "recompute-granularity full, or PP 1."
        )
    config, precision = _with_precision(config, spec)
    if here:
        check_machine(config, spec)
    if config.model.init_method_std is not None:
        spec = replace(spec, decoder=replace(spec.decoder, init_std=config.model.init_method_std))
    layout = config.parallel.layout(world_size)
    split = _split(config, spec, layout)
    spec.check_layout(layout, split)
    if config.data.train_data_path is None:
        raise InputError("train-data-path is missing; give an energon dataset directory.")
    for part_of in (media_limits, trained_text, mixtures):
        part_of(config)
    recompute, vit_recompute = _recompute(config, split)
    plan = Plan(
        config=config,
        spec=spec,
        layout=layout,
        split=split,
        hf_dir=hf_dir,
        precision=precision,
        num_microbatches=config.batch.num_microbatches(layout.dp),
        recompute=recompute,
        vit_recompute=vit_recompute,
    )
    if plan.row_length % layout.row_parts:
        raise InputError(
            f"rows of {plan.row_length} tokens (seq-length, or max-padding-length without packing) "
            f"do not divide over {layout.row_parts} parts, as context parallelism and "
            f"sequence-parallel need; use a multiple of {layout.row_parts}."
        )
    _check_log(plan)
    if layout.vp > 1 and plan.num_microbatches % layout.pp:
        raise InputError(
            f"{plan.num_microbatches} microbatches a step are not a multiple of PP {layout.pp}, as "
            f"virtual stages need; change global-batch-size or micro-batch-size."
        )
    return plan


def _check_text_only(config: TrainConfig, spec: VLMSpec) -> None:
    """Raises InputError: an option is about a vision tower, which this model has not."""
    for options, names in (
        (config.parallel, ("vit_data_parallel", "vit_pp_layers")),
        (config.model, ("freeze_vit", "freeze_merger", "vit_recompute_granularity",
                        "vit_recompute_num_layers")),
        (config.optimizer, ("vit_lr", "merger_lr")),
        (config.data, ("max_patches_per_row", *(f.name for f in fields(MediaLimits)))),
    ):
        for field in fields(options):
            if field.name in names and getattr(options, field.name) != field.default:
                raise InputError(
                    f"{field.name.replace('_', '-')} is {getattr(options, field.name)}, but "
                    f"{spec.model_type} takes text alone; leave it out."
                )
    if config.model.freeze_llm:
        raise InputError(
            f"freeze-llm leaves nothing to train of {spec.model_type}, which is a language model "
            f"alone; leave it out."
        )


def needs_load(config: TrainConfig) -> bool:
    """Whether `load` is given and SAVE holds no checkpoint to go on from instead.

    Raises:
        InputError: none of SAVE's checkpoints can be used.
    """
    return config.checkpoint.load is not None and _own(config, {}) is None


def hf_directory(config: TrainConfig) -> Path | None:
    """The directory of config.json and the tokenizer; None where nothing says it.

    That of a run that goes on from SAVE is SAVE, which has its own copy, unless hf-config is given.

    Raises:
        InputError: none of SAVE's checkpoints can be used.
    """
    options = config.checkpoint
    goes_on = (options.save is not None and (Path(options.save) / "config.json").is_file()
               and _own(config, {}) is not None)
    found = options.hf_config or (options.save if goes_on else options.load or options.save)
    return None if found is None else Path(found)


def _check_log(plan: Plan) -> None:
    """What is to be shown of the run, and cannot be."""
    log, world = plan.config.log, plan.layout.world_size
    if log.report_file is not None and plan.report_file is None:
        raise InputError(
            "report-file needs the run's numbers and its page; give metrics-file or save, and "
            "leave out no-report."
        )
    if not log.profile:
        return
    if plan.profile_dir is None:
        raise InputError("profile has no directory for its traces; give profile-dir.")
    if log.profile_step_start > plan.config.batch.train_iters:
        raise InputError(
            f"profile-step-start {log.profile_step_start} is after the last of "
            f"{plan.config.batch.train_iters} steps; lower it, or raise train-iters."
        )
    for rank in log.profile_ranks:
        if not 0 <= rank < world:
            raise InputError(
                f"profile-ranks has {rank} but this run has ranks 0 to {world - 1}; leave it out."
            )


def _split(config: TrainConfig, spec: VLMSpec, layout: Layout) -> StageSplit:
    """The split that was asked for; of a tower of which nothing was said, the checkpoint's own, if
    that is for this layout.

    So nobody need repeat the first-stage-layers of the conversion: the checkpoint carries it.
    """
    parallel = config.parallel
    first = parallel.decoder_first_pipeline_num_layers
    lists = {
        "llm": layer_list(parallel.pp_layers, "pp-layers"),
        "vit": layer_list(parallel.vit_pp_layers, "vit-pp-layers"),
    }
    info = None if first is not None else _source(config)[0]
    saved = None if info is None or _fits_all(info) else info.split
    if saved is not None and (saved.pp, saved.vp) == (layout.pp, layout.vp):
        lists = {name: lists[name] or rows for name, rows in saved.to_dict().items()}
    return spec.split(pp=layout.pp, vp=layout.vp, first_stage_layers=first, **lists)


def _source(
    config: TrainConfig, damaged: dict[Path, str] | None = None
) -> tuple[CheckpointInfo | None, bool]:
    """What SAVE holds, else what `load` does; and whether it is SAVE's."""
    info = _own(config, {} if damaged is None else damaged)
    if info is not None:
        return info, True
    load = config.checkpoint.load
    return (None if load is None else inspect_weights(load)), False


def _with_precision(config: TrainConfig, spec: VLMSpec) -> tuple[TrainConfig, str]:
    """The configuration with its precision said, and a word on who says it: an option, else the run
    that is resumed, else config.json."""
    if config.model.dtype is not None:
        return config, config.model.dtype
    (info, own), dtype, says = _source(config), spec.dtype, "config.json"
    if info is not None and not weights_alone(config, info, own):
        had = [name for name in PRECISIONS if info.args.get(name)]
        if had or "bf16" in info.args:
            dtype, says = PRECISIONS[had[0]] if had else "float32", "the checkpoint"
    model = config.model.with_dtype(dtype)
    return replace(config, model=model), f"{dtype}, as {says} says"


def _fits_all(info: CheckpointInfo) -> bool:
    """Whether it was written for no layout in particular."""
    return info.format == "torch_dist" and info.release


def _recompute(config: TrainConfig, split: StageSplit) -> tuple[Recompute, Recompute]:
    run = config.model
    if run.cpu_offloading and run.cpu_offloading_num_layers >= split.num_layers:
        raise InputError(
            f"cpu-offloading-num-layers {run.cpu_offloading_num_layers} must be "
            f"less than the model's {split.num_layers} language layers; lower it, or use "
            f"recompute-granularity full."
        )
    return recompute_of(
        split, granularity=run.recompute_granularity, method=run.recompute_method,
        num_layers=run.recompute_num_layers, vit_granularity=run.vit_recompute_granularity,
        vit_num_layers=run.vit_recompute_num_layers,
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
    for option, given in (
        ("save", config.checkpoint.save),
        ("tensorboard-dir", config.log.tensorboard_dir),
        ("metrics-file", config.log.metrics_file),
        ("report-file", config.log.report_file),
        ("profile-dir", config.log.profile_dir),
    ):
        if given is None:
            continue
        folder = Path(given).absolute()
        if option.endswith("-file"):
            if folder.is_dir():
                raise InputError(f"{option} {given} is a directory; give a file.")
            folder = folder.parent
        there = next(p for p in (folder, *folder.parents) if p.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            what = "may not be written to" if there.is_dir() else "is a file"
            raise InputError(f"{option} {given} cannot be made: {there} {what}; give another.")


def find_checkpoint(
    plan: Plan, damaged: dict[Path, str] | None = None
) -> tuple[CheckpointInfo | None, bool]:
    """What to start from, and whether it is this run's own: SAVE if it holds one, else LOAD.

    Args:
        damaged: checkpoints of SAVE that cannot be used, and why; gets those found so here.

    Raises:
        InputError: LOAD holds no checkpoint, or one that cannot be used with these options; or all
            of SAVE's are damaged.
    """
    info, own = _source(plan.config, damaged)
    if info is None:
        return None, False
    if not weights_alone(plan.config, info, own):
        _check_options(plan.config, info)
    return _checked(plan, info), own


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


# Options of a run that its checkpoint goes on with.
SCHEDULE = ("lr", "min_lr", "vit_lr", "merger_lr", "lr_decay_style", "lr_warmup_iters",
            "lr_decay_iters", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps")


def _check_options(config: TrainConfig, info: CheckpointInfo) -> None:
    """A resumed run keeps its kind of optimizer and, unless told otherwise, its schedule.

    Its length may change, and with it the schedule's end and a warmup that is a share of it.
    """
    saved, here = dict(info.args), config.resolved()
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
        if options.get("lr_warmup_fraction") is not None:
            options["lr_warmup_iters"] = round(
                options["lr_warmup_fraction"] * options["lr_decay_iters"]
            )
        for part in PARTS:
            options.setdefault(f"freeze_{part}", False)
    if not config.optimizer.override_opt_param_scheduler:
        for name in (name for name in SCHEDULE if name not in follows):
            if name in saved and saved[name] != here[name]:
                raise InputError(
                    f"{info.path} was trained with {_flag(name)} {saved[name]} but this run has "
                    f"{here[name]}; give the old value, or --override-opt-param-scheduler to take "
                    f"the new one."
                )
    if config.checkpoint.no_load_optim:
        return
    # State is of what is trained, laid out by the kind of optimizer and, where it is not sharded,
    # by precision.
    sharded = here["use_distributed_optimizer"]
    for name in ("use_distributed_optimizer", *(f"freeze_{part}" for part in PARTS),
                 *(() if sharded else ("bf16", "fp16"))):
        if name in saved and saved[name] != here[name]:
            raise InputError(
                f"{info.path} holds the optimizer state of a run with {_flag(name)} "
                f"{str(saved[name]).lower()} but this run has {str(here[name]).lower()}; give the "
                f"old value, or --no-load-optim to start the optimizer anew."
            )


def _flag(name: str) -> str:
    return name.replace("_", "-")


def weights_alone(config: TrainConfig, info: CheckpointInfo, own: bool) -> bool:
    """Whether a run takes nothing but the weights of `info`, which any layout then may have."""
    return info.format != "torch_dist" or info.release or (config.checkpoint.finetune and not own)


def check_weights(plan: Plan, info: CheckpointInfo | None, own: bool) -> None:
    """Look at the names and shapes of the weights that a run is to take from `info`.

    Raises:
        InputError: gaps, surpluses, other shapes, unreadable files.
    """
    if info is not None and weights_alone(plan.config, info, own):
        open_weights(info, family(plan.spec.model_type).weight_map(plan.spec))


def _checked(plan: Plan, info: CheckpointInfo) -> CheckpointInfo:
    if info.model_type not in (None, plan.spec.model_type):
        raise InputError(
            f"{info.path} holds a {info.model_type} model but config.json says "
            f"{plan.spec.model_type}; give the checkpoint converted from it."
        )
    return info
