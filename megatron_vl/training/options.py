"""Everything a training run can be told, in groups; flags keep Megatron-LM's names.

Every field is one flag (`--train-iters`), one YAML key (`train-iters` or `train_iters`) and one
environment variable (`MEGATRON_VL_TRAIN_ITERS`), which `config_sources` reads; its help text is
the field's documentation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_vl.errors import InputError
from megatron_vl.models.common.parts import PARTS
from megatron_vl.ops.attention import BACKENDS, ORDERS
from megatron_vl.parallel import Layout


def option(default: Any, help: str, *, choices: tuple | None = None, kind: type | None = None):
    """A field with its help text, the values it may take and, where the default does not tell it,
    its type. A default that is a tuple stands for one or several values of `kind`."""
    return field(default=default, metadata={"help": help, "choices": choices, "kind": kind})


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelOptions:
    """How the model is spread over processes."""

    tensor_model_parallel_size: int = option(1, "ranks that share every layer (TP)")
    pipeline_model_parallel_size: int = option(1, "stages that hold different layers (PP)")
    num_virtual_stages_per_pipeline_rank: int = option(1, "model chunks per stage (VP)")
    context_parallel_size: int = option(1, "ranks that share one row's tokens (CP)")
    sequence_parallel: bool = option(False, "split norms and residuals over TP; no effect at TP 1")
    vit_data_parallel: bool = option(
        False, "divide the images over TP ranks, each with a whole vision tower, instead of "
        "cutting the tower; no effect at TP 1"
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "language layers on stage 0; the rest is divided over the other stages", kind=int
    )
    distributed_timeout_minutes: float = option(
        10.0, "minutes a collective may take before the job is given up"
    )

    def __post_init__(self) -> None:
        # The sizes are checked where they are multiplied: see Layout.
        _above_zero(self, "distributed_timeout_minutes")

    @property
    def layout_size(self) -> int:
        """Processes that hold one replica of the model."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    def layout(self, world_size: int) -> Layout:
        """The layout that fills `world_size` processes. Raises InputError when none does."""
        return Layout.for_world(
            world_size,
            tp=self.tensor_model_parallel_size,
            pp=self.pipeline_model_parallel_size,
            vp=self.num_virtual_stages_per_pipeline_rank,
            cp=self.context_parallel_size,
            sequence_parallel=self.sequence_parallel,
            vit_data_parallel=self.vit_data_parallel,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """How much is seen at once."""

    micro_batch_size: int = option(1, "rows a forward pass takes on one data-parallel rank")
    global_batch_size: int = option(1, "rows of one optimizer step over all ranks")
    seq_length: int = option(2048, "tokens of a row, and the longest sample")
    max_padding_length: int | None = option(
        None, "row length when a row holds one sample; default: seq-length", kind=int
    )
    train_iters: int = option(100, "optimizer steps")
    train_samples: int | None = option(
        None, "rows of the whole run, instead of train-iters; a row is a sample where none are "
        "packed", kind=int
    )
    num_train_epochs: float | None = option(
        None, "times that every sample is read, instead of train-iters", kind=float
    )
    calculate_per_sample_loss: bool = option(
        False, "mean loss of each sample, then the mean over the samples of a step; default: the "
        "mean over all its trained tokens"
    )

    def __post_init__(self) -> None:
        _at_least(self, 1, "micro_batch_size", "global_batch_size", "seq_length", "train_iters",
                  "train_samples")
        if self.num_train_epochs is not None:
            _above_zero(self, "num_train_epochs")
        pad = self.max_padding_length
        if pad is not None and not 0 < pad <= self.seq_length:
            raise InputError(
                f"max-padding-length (PAD_LEN) {pad} must be between 1 and seq-length (SEQ_LEN) "
                f"{self.seq_length}."
            )

    def num_microbatches(self, dp: int) -> int:
        """Forward passes of one step on every rank. Raises InputError when it is not whole."""
        share = self.micro_batch_size * dp
        if self.global_batch_size % share:
            raise InputError(
                f"global-batch-size {self.global_batch_size} is not a multiple of micro-batch-size "
                f"{self.micro_batch_size} x data-parallel size {dp} = {share}; use a multiple of "
                f"{share}."
            )
        return self.global_batch_size // share


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerOptions:
    """AdamW and its schedule."""

    lr: float = option(1e-5, "learning rate after warmup")
    min_lr: float = option(1e-6, "learning rate at the end")
    vit_lr: float | None = option(
        None, "lr of the vision tower, min-lr in proportion; default: lr", kind=float
    )
    merger_lr: float | None = option(
        None, "lr of the merger, min-lr in proportion; default: lr", kind=float
    )
    lr_decay_style: str = option("cosine", "shape of the decay", choices=("cosine", "linear",
                                                                         "constant"))
    lr_warmup_iters: int = option(0, "steps of linear warmup from 0")
    lr_warmup_fraction: float | None = option(
        None, "the same as a share of the schedule's steps, instead of lr-warmup-iters", kind=float
    )
    lr_decay_iters: int | None = option(None, "steps until min-lr; default: train-iters", kind=int)
    weight_decay: float = option(0.01, "decoupled weight decay; none on biases and norms")
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.95, "decay of the second moment")
    adam_eps: float = option(1e-8, "added to the root of the second moment")
    clip_grad: float = option(1.0, "largest global gradient norm; 0 never clips")
    use_distributed_optimizer: bool = option(False, "share optimizer state over data ranks")
    optimizer_cpu_offload: bool = option(False, "keep and update optimizer state in host memory")
    optimizer_offload_fraction: float = option(
        1.0, "with optimizer-cpu-offload: the share of the state that is kept there, 0 to 1"
    )
    overlap_grad_reduce: bool = option(False, "reduce gradients while backward still runs")
    overlap_param_gather: bool = option(
        False, "gather updated weights while the next forward runs; with use-distributed-optimizer "
        "and overlap-grad-reduce"
    )
    grad_reduce_in_bf16: bool = option(
        False, "with bf16: sum gradients in bf16, in half the memory, and less exactly"
    )
    override_opt_param_scheduler: bool = option(
        False, "take lr, its schedule, betas, eps and weight decay from the options, not from the "
        "checkpoint"
    )
    initial_loss_scale: float = option(
        2.0**12, "with fp16: what the loss is multiplied by at first; halved at an overflow"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr:
            raise InputError(f"min-lr {self.min_lr} must be between 0 and lr {self.lr}.")
        _at_least(self, 0, "lr_warmup_iters", "weight_decay", "clip_grad", "vit_lr", "merger_lr")
        _at_least(self, 1, "lr_decay_iters")
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            raise InputError(
                "overlap-param-gather needs use-distributed-optimizer (DO true) and "
                "overlap-grad-reduce; give both, or leave it out."
            )
        if self.lr_warmup_fraction is not None:
            if not 0 <= self.lr_warmup_fraction < 1:
                raise InputError(
                    f"lr-warmup-fraction is {self.lr_warmup_fraction}; it must be at least 0 and "
                    f"less than 1."
                )
            if self.lr_warmup_iters:
                raise InputError(
                    "lr-warmup-iters and lr-warmup-fraction exclude one another; give one of them."
                )
        _above_zero(self, "adam_eps", "initial_loss_scale")
        if not 0 <= self.optimizer_offload_fraction <= 1:
            raise InputError(
                f"optimizer-offload-fraction (OPTIMIZER_OFFLOAD) is "
                f"{self.optimizer_offload_fraction}; it must be between 0 and 1."
            )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 0 "
                    f"and less than 1."
                )
        for name in ("vit_lr", "merger_lr"):
            if getattr(self, name) and not self.lr:
                raise InputError(
                    f"{name.replace('_', '-')} is {getattr(self, name)} but lr is 0, whose "
                    f"schedule it scales; give an lr, and freeze what shall not change."
                )

    def lr_ratio(self, part: str) -> float:
        """The learning rate of a part, a key of PARTS, as a multiple of lr at every step."""
        own = {"vit": self.vit_lr, "merger": self.merger_lr}.get(part)
        return 1.0 if own is None or own == self.lr else own / self.lr


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRunOptions:
    """Precision, memory, and what is trained."""

    bf16: bool = option(False, "parameters and activations in bfloat16, optimizer in fp32")
    fp16: bool = option(False, "parameters and activations in float16 with loss scaling")
    fp8_format: str | None = option(
        None, "matrix products in fp8, with bf16; needs TransformerEngine on a CUDA device",
        choices=("e4m3", "hybrid"), kind=str,
    )
    attention_backend: str = option(
        "auto", "who computes variable-length attention; auto: the first of the others that runs; "
        "flash-first: the same, with flash-attention before the fused kernels",
        choices=(*ORDERS, *BACKENDS),
    )
    fused_ops: str = option(
        "auto", "elementwise operations as one kernel each, compiled in the first steps, where the "
        "device gains by it; off: by plain torch", choices=("auto", "off"),
    )
    recompute_granularity: str | None = option(
        None, "recompute activations in backward: attention, or whole layers",
        choices=("selective", "full"), kind=str,
    )
    recompute_method: str = option("uniform", "with full: all layers in groups, or the first of a "
                                   "stage", choices=("uniform", "block"))
    recompute_num_layers: int = option(1, "with full: layers of a uniform group, or of a stage")
    vit_recompute_granularity: str = option(
        "same", "the same of the vision tower", choices=("same", "none", "selective", "full")
    )
    vit_recompute_num_layers: int | None = option(
        None, "with full, of the vision tower; default: recompute-num-layers, or as many as it has",
        kind=int,
    )
    cpu_offloading: bool = option(
        False, "keep activations in host memory; needs TransformerEngine on a CUDA device"
    )
    cpu_offloading_num_layers: int = option(1, "layers whose activations are offloaded")
    freeze_vit: bool = option(False, "leave the vision tower as it is, but for the merger")
    freeze_merger: bool = option(False, "leave the merger, the MLP behind the tower, as it is")
    freeze_llm: bool = option(
        False, "leave the language model as it is, with its embedding and its head"
    )
    init_method_std: float | None = option(
        None, "standard deviation of random weights; default: config.json's", kind=float
    )
    deterministic: bool = option(
        False, "the same bits at every run of the same command; slower on a GPU"
    )
    seed: int = option(1234, "of weights, data order and everything else random")

    def __post_init__(self) -> None:
        if self.bf16 and self.fp16:
            raise InputError("bf16 and fp16 exclude one another; give one of them.")
        if self.fp8_format and not self.bf16:
            raise InputError("fp8-format is for bf16 training; add bf16.")
        if len(self.frozen) == len(PARTS):
            raise InputError(
                "freeze-vit, freeze-merger and freeze-llm together leave nothing to train; leave "
                "out one of them."
            )
        if self.cpu_offloading and (
            self.recompute_granularity or self.vit_recompute_granularity in ("selective", "full")
        ):
            raise InputError(
                "cpu-offloading (AC offload) and recompute-granularity (AC sel, full) exclude one "
                "another; use recompute-granularity full alone, which needs the least memory."
            )
        _at_least(self, 1, "recompute_num_layers", "vit_recompute_num_layers",
                  "cpu_offloading_num_layers")
        _at_least(self, 0, "seed", "init_method_std")

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def frozen(self) -> tuple[str, ...]:
        """Keys of PARTS that are not trained."""
        return tuple(part for part in PARTS if getattr(self, f"freeze_{part}"))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """Where rows come from."""

    train_data_path: str | None = option(
        None, "prepared dataset; several as A,B (each once an epoch) or 0.3,A,0.7,B (by weight); "
        "or the YAML of an energon metadataset", kind=str,
    )
    valid_data_path: str | None = option(
        None, "the same, of the validation split; default: train-data-path", kind=str,
    )
    max_samples: int | None = option(
        None, "of each training dataset read only the first so many samples", kind=int
    )
    num_workers: int = option(1, "data processes per data-parallel rank; 0 reads in the trainer")
    packing_buffer_size: int = option(
        0, "samples packed together into rows of seq-length; 0: one sample a row"
    )
    max_patches_per_row: int | None = option(
        None, "vision patches of a row at most, to even out the vision tower's work", kind=int
    )
    max_skipped_samples: int = option(
        100, "samples that cannot be used and are skipped, before the run stops; 0: none"
    )
    train_on_prompt: bool = option(False, "train on every token, not on the answers alone")
    mask_history: bool = option(False, "train on the last answer of a conversation alone")
    image_min_pixels: int | None = option(
        None, "least pixels of a resized image; default: preprocessor_config.json's", kind=int
    )
    image_max_pixels: int | None = option(
        None, "most pixels of a resized image; default: preprocessor_config.json's", kind=int
    )
    video_min_pixels: int | None = option(
        None, "least pixels of a video's resized frame; default: the model's own files", kind=int
    )
    video_max_pixels: int | None = option(
        None, "most pixels of a video's resized frame; default: the model's own files", kind=int
    )
    video_fps: float = option(2.0, "frames taken from a second of video")
    video_maxlen: int = option(128, "frames taken from one video at most")
    video_positions: str = option(
        "published", "text after a video goes on behind its last frame, as the model was trained; "
        "transformers5: behind its longest side, as transformers 5 has it",
        choices=("published", "transformers5"),
    )
    shuffle_buffer_size: int = option(1000, "samples shuffled together")
    max_samples_per_sequence: int = option(100, "samples read in a row from one shard")
    eval_interval: int = option(1000, "steps between validations; 0: never")
    eval_iters: int = option(0, "batches of one validation; 0: the whole split")

    def __post_init__(self) -> None:
        _at_least(self, 0, "num_workers", "packing_buffer_size", "shuffle_buffer_size",
                  "eval_interval", "eval_iters", "max_skipped_samples")
        _at_least(self, 1, "max_samples_per_sequence", "max_samples", "max_patches_per_row")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointOptions:
    """What is read at the start and written on the way."""

    load: str | None = option(None, "checkpoint directory to start from", kind=str)
    model_size: str = option("auto", "2B, 7B, 72B: refuse another model's config.json; auto: take "
                             "what it says")
    hf_config: str | None = option(
        None, "directory with config.json and the tokenizer; default: save where it holds a "
        "checkpoint, else load", kind=str
    )
    save: str | None = option(None, "directory of the run's checkpoints; resumes what it holds",
                              kind=str)
    save_interval: int = option(1000, "steps between checkpoints; the last step is always saved")
    finetune: bool = option(False, "take only the weights of load, start at step 0")
    no_load_optim: bool = option(False, "do not load optimizer state")
    no_load_rng: bool = option(False, "do not load random-number state")
    no_save_optim: bool = option(False, "do not save optimizer state; the run cannot resume")
    no_save_rng: bool = option(False, "do not save random-number state")
    async_save: bool = option(
        False, "write checkpoints behind training, by processes that need up to a copy of the "
        "state in host memory"
    )
    save_total_limit: int | None = option(
        None, "checkpoints of SAVE to keep, the newest; default: all", kind=int
    )
    verify_checksums: bool = option(
        True, "read a checkpoint once before resuming from it, and take the one before if it is "
        "damaged"
    )

    def __post_init__(self) -> None:
        _at_least(self, 1, "save_interval", "save_total_limit")


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultOptions:
    """What happens when something fails."""

    max_restarts: int = option(
        3, "times that the processes are started again after one of them failed; a run without "
        "SAVE never is"
    )
    hang_timeout: float | None = option(
        None, "seconds without progress until every rank writes its stacks and the job ends; "
        "default: nine tenths of distributed-timeout-minutes; 0: never", kind=float,
    )
    max_skipped_steps: int = option(
        20, "steps with a loss or gradient that is not finite, or a spike, that are skipped before "
        "the run stops; 0: none"
    )
    skip_grad_spikes: float = option(
        0.0, "skip a step whose gradient norm is more than this many times the median of the last "
        "64 updates'; 0: never"
    )

    def __post_init__(self) -> None:
        _at_least(self, 0, "max_restarts", "hang_timeout", "max_skipped_steps")
        if self.skip_grad_spikes and not self.skip_grad_spikes > 1:
            raise InputError(
                f"skip-grad-spikes is {self.skip_grad_spikes}; give a factor above 1, as 10, or 0 "
                f"for never."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogOptions:
    """What is shown."""

    log_interval: int = option(1, "steps between log lines")
    tensorboard_dir: str | None = option(None, "TensorBoard directory", kind=str)
    metrics_file: str | None = option(
        None, "JSONL with the numbers of every step; default: metrics.jsonl in save", kind=str
    )
    report: bool = option(True, "write a page about the run at its end")
    report_file: str | None = option(
        None, "that page; default: report.html beside metrics-file, or X.html beside X.jsonl",
        kind=str
    )
    log_tps: bool = option(False, "print the run's average throughput at its end")
    device_peak_tflops: float | None = option(
        None, "what one device can do at most in bf16, in 10^12 FLOPs a second, for MFU; default: "
        "by the device's name", kind=float
    )
    wandb_project: str | None = option(None, "log to this project of Weights & Biases", kind=str)
    wandb_exp_name: str | None = option(None, "the run's name there", kind=str)
    swanlab_project: str | None = option(None, "log to this project of SwanLab", kind=str)
    swanlab_exp_name: str | None = option(None, "the run's name there", kind=str)
    mlflow_experiment: str | None = option(None, "log to this experiment of MLflow", kind=str)
    mlflow_run_name: str | None = option(None, "the run's name there", kind=str)
    profile: bool = option(False, "trace some steps with torch's profiler")
    profile_step_start: int = option(10, "the first iteration that is traced")
    profile_step_end: int = option(12, "the first iteration after it that is not")
    profile_ranks: tuple[int, ...] = option((0,), "ranks that are traced", kind=int)
    profile_dir: str | None = option(
        None, "directory of the traces; default: tensorboard-dir, or profile beside metrics-file",
        kind=str
    )

    def __post_init__(self) -> None:
        _at_least(self, 1, "log_interval", "profile_step_start")
        _above_zero(self, *(["device_peak_tflops"] if self.device_peak_tflops is not None else []))
        if self.profile_step_end <= self.profile_step_start:
            raise InputError(
                f"profile-step-end {self.profile_step_end} must be above profile-step-start "
                f"{self.profile_step_start}: it is the first iteration that is not traced."
            )
        for tracker in ("wandb_project", "swanlab_project", "mlflow_experiment"):
            name = tracker.split("_")[0] + ("_run_name" if "mlflow" in tracker else "_exp_name")
            if getattr(self, name) is not None and getattr(self, tracker) is None:
                raise InputError(
                    f"{name.replace('_', '-')} is given without {tracker.replace('_', '-')}; give "
                    f"both, or neither."
                )


GROUPS = {
    "parallel": ParallelOptions,
    "batch": BatchOptions,
    "optimizer": OptimizerOptions,
    "model": ModelRunOptions,
    "data": DataOptions,
    "checkpoint": CheckpointOptions,
    "fault": FaultOptions,
    "log": LogOptions,
}


def _at_least(options, minimum: int, *names: str) -> None:
    """Refuse a smaller value, and NaN; an option left to its default of None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= minimum:
            raise InputError(
                f"{name.replace('_', '-')} is {value}; it must be at least {minimum}."
            )


def _above_zero(options, *names: str) -> None:
    for name in names:
        if not getattr(options, name) > 0:
            raise InputError(
                f"{name.replace('_', '-')} is {getattr(options, name)}; it must be above 0."
            )
