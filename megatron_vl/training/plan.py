"""What a run is, found out before any process group or model exists; imports no Megatron-Core."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from megatron_vl.data.options import row_length
from megatron_vl.errors import InputError
from megatron_vl.models.common.balance import Balance
from megatron_vl.models.common.experts_way import experts_way
from megatron_vl.models.common.recompute import Recompute, recompute_of
from megatron_vl.models.media import MediaLimits
from megatron_vl.models.registry import family, load_spec
from megatron_vl.models.spec import ModelSpec
from megatron_vl.ops.experts import ON, ExpertsCase, Way
from megatron_vl.parallel import LANGUAGE, VISION, Layout, StageSplit
from megatron_vl.parallel.stages import layer_list
from megatron_vl.peft.trainable import Trainable
from megatron_vl.training.adapter import trainable_of
from megatron_vl.training.checkpoint.same_model import check_same_model
from megatron_vl.training.checkpoint.start import (
    goes_on,
    hf_directory,
    needs_load,
    source_of,
    weights_alone,
)
from megatron_vl.training.machine import check_machine
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.options.spellings import PRECISIONS
from megatron_vl.training.paths import media_limits, mixtures, trained_text
from megatron_vl.training.reporting.history import METRICS, page_of
from megatron_vl.weights.mcore_io import CheckpointInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run is, found out before any process group or model exists."""

    config: TrainConfig
    spec: ModelSpec
    layout: Layout
    split: StageSplit
    hf_dir: Path  # config.json and tokenizer
    precision: str  # and what says it, in words
    num_microbatches: int
    recompute: Recompute  # of the language model
    vit_recompute: Recompute  # of the vision tower
    trainable: Trainable
    balance: Balance  # of the experts, where there are any

    @property
    def row_length(self) -> int:
        batch, data = self.config.batch, self.config.data
        return row_length(batch.seq_length, batch.max_padding_length, packs=data.packs)

    @property
    def row_multiple(self) -> int | None:
        """Of what the length of unpacked rows is a multiple; None: all have `row_length`."""
        if self.config.data.packs or not self.layout.lengths_vary:
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
    def described_experts(self) -> str:
        """What spreads tokens over the experts, in words; empty where there are none."""
        experts = self.spec.decoder.experts
        if experts is None:
            return ""
        return f"{experts.count} experts a layer, {experts.per_token} a token: {self.balance}"

    def experts_way(self, case: Callable[..., ExpertsCase] = ExpertsCase.here) -> Way | None:
        """How experts are computed; None where there are none. See `experts_way`."""
        run = self.config.model
        return experts_way(
            self.spec, self.layout, self.config.experts.moe_grouped_gemm, dtype=run.dtype,
            kept=self.trainable.quantize_base or run.fp8_format, case=case,
        )

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
    if load is not None and goes_on(config):
        check_same_model(Path(config.checkpoint.save), Path(load), again=config.lora.given)
    family(spec.model_type).check_size(spec, config.checkpoint.model_size)
    if spec.vision is None:
        _check_text_only(config, spec)
    if config.model.train_constants and not family(spec.model_type).weight_map(spec).constants:
        raise InputError(
            f"train-constants is true, but {spec.model_type} has no constant weight; leave it out."
        )
    if config.model.cpu_offloading and config.parallel.pipeline_model_parallel_size > 1:
        raise InputError(
            "cpu-offloading needs a pipeline of one stage; use "
            "recompute-granularity full, or PP 1."
        )
    config, precision = _with_precision(config, spec)
    if here:
        check_machine(config, spec)
        if config.lora.given and load is None:
            raise InputError(
                "an adapter is trained beside the weights of a model; give load its directory."
            )
    if config.model.init_method_std is not None:
        spec = replace(spec, decoder=replace(spec.decoder, init_std=config.model.init_method_std))
    layout = config.parallel.layout(world_size)
    split = _split(config, spec, layout)
    spec.check_run(layout, split)
    if config.data.train_data_path is None:
        raise InputError("train-data-path is missing; give an energon dataset directory.")
    for part_of in (media_limits, trained_text, mixtures):
        part_of(config)
    if config.offload.offload_modules and split.encoders_span:
        raise InputError(
            "offload-modules needs language layers on every stage and chunk, but the vision tower "
            "spans several; leave out vit-pp-layers, or offload-modules."
        )
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
        trainable=trainable_of(config, spec),
        balance=config.experts.balance(spec),
    )
    if plan.row_length % layout.row_parts:
        raise InputError(
            f"rows of {plan.row_length} tokens (seq-length, or max-padding-length without packing) "
            f"do not divide over {layout.row_parts} parts, as context parallelism and "
            f"sequence-parallel need; use a multiple of {layout.row_parts}."
        )
    if here and config.experts.moe_grouped_gemm == ON:
        plan.experts_way(partial(ExpertsCase.here, touch_device=False))
    config.tp_overlap.check(
        layout, dtype=config.model.dtype, lengths_vary=plan.row_multiple is not None,
        local=None if config.lora.quantize_base is None else "quantize-base",
    )
    if here:
        config.tp_overlap.settings()
    _check_log(plan)
    if layout.vp > 1 and plan.num_microbatches % layout.pp:
        raise InputError(
            f"{plan.num_microbatches} microbatches a step are not a multiple of PP {layout.pp}, as "
            f"virtual stages need; change global-batch-size or micro-batch-size."
        )
    return plan


def _check_text_only(config: TrainConfig, spec: ModelSpec) -> None:
    """Raises InputError: an option is about a vision tower, which this model has not."""
    for options, names in (
        (config.parallel, ("vit_data_parallel", "vit_pp_layers")),
        (config.model, ("freeze_vit", "freeze_merger", "vit_recompute_granularity",
                        "vit_recompute_num_layers")),
        (config.optimizer, ("vit_lr", "merger_lr")),
        (config.lora, ("train_vit", "train_merger")),
        (config.data, ("max_patches_per_row", *(f.name for f in fields(MediaLimits)))),
    ):
        for field in fields(options):
            if field.name in names and getattr(options, field.name) != field.default:
                raise spec.takes_text_alone(field.name, getattr(options, field.name))
    if config.model.freeze_llm:
        raise InputError(
            f"freeze-llm leaves nothing to train of {spec.model_type}, which is a language model "
            f"alone; leave it out."
        )


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


def _split(config: TrainConfig, spec: ModelSpec, layout: Layout) -> StageSplit:
    """The split that was asked for; of a tower of which nothing was said, the checkpoint's own, if
    that is for this layout.

    So nobody need repeat the first-stage-layers of the conversion: the checkpoint carries it.
    """
    parallel = config.parallel
    first = parallel.decoder_first_pipeline_num_layers
    lists = {
        LANGUAGE: layer_list(parallel.pp_layers, "pp-layers"),
        VISION: layer_list(parallel.vit_pp_layers, "vit-pp-layers"),
    }
    info = None if first is not None else source_of(config)[0]
    of_this = info is not None and info.model_type in (None, spec.model_type)
    saved = info.split if of_this and not _fits_all(info) else None
    if saved is not None and (saved.pp, saved.vp) == (layout.pp, layout.vp):
        lists = {name: lists[name] or rows for name, rows in saved.to_dict().items()}
    return spec.split(pp=layout.pp, vp=layout.vp, first_stage_layers=first, **lists)


def _with_precision(config: TrainConfig, spec: ModelSpec) -> tuple[TrainConfig, str]:
    """The configuration with its precision said, and a word on who says it: an option, else the run
    that is resumed, else config.json."""
    if config.model.dtype is not None:
        return config, config.model.dtype
    (info, own), dtype, says = source_of(config), spec.dtype, "config.json"
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
