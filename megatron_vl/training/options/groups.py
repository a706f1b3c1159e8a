"""Everything a training run can be told, in groups; flags keep Megatron-LM's names.

Every field is one flag (`--train-iters`), one YAML key (`train-iters` or `train_iters`) and one
environment variable (`MEGATRON_VL_TRAIN_ITERS`), which `config_sources` reads; its help text is
the field's documentation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_vl.data.options import TrainedText
from megatron_vl.errors import InputError, check_bounds
from megatron_vl.models.common.parts import MERGER, PARTS
from megatron_vl.models.media import MediaLimits
from megatron_vl.ops.attention import BACKENDS, ORDERS
from megatron_vl.parallel import VISION, Layout
from megatron_vl.training.options.bounds import BOUNDS
from megatron_vl.training.options.checkpoint import CheckpointOptions
from megatron_vl.training.options.experts import ExpertsOptions
from megatron_vl.training.options.log import LogOptions
from megatron_vl.training.options.lora import LoraOptions
from megatron_vl.training.options.offload import OffloadOptions
from megatron_vl.training.options.option import defaults, option
from megatron_vl.training.options.spellings import PRECISIONS
from megatron_vl.training.options.tp_overlap import TpOverlapOptions

# Defaults of options whose owners are elsewhere.
_MEDIA, _TEXT = defaults(MediaLimits), defaults(TrainedText)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelOptions:
    """How the model is spread over processes."""

    tensor_model_parallel_size: int = option(1, "ranks that share every layer (TP)")
    pipeline_model_parallel_size: int = option(1, "stages that hold different layers (PP)")
    num_virtual_stages_per_pipeline_rank: int = option(1, "model chunks per stage (VP)")
    context_parallel_size: int = option(1, "ranks that share one row's tokens (CP)")
    expert_model_parallel_size: int = option(
        1, "ranks that hold different experts of a layer (EP), taken from TP, CP and DP"
    )
    expert_tensor_parallel_size: int | None = option(
        None, "ranks that share an expert (ETP), a divisor of TP; default: TP", kind=int
    )
    sequence_parallel: bool = option(False, "split norms and residuals over TP; no effect at TP 1")
    vit_data_parallel: bool = option(
        False, "divide the images over TP ranks, each with a whole vision tower, instead of "
        "cutting the tower; no effect at TP 1"
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "language layers on stage 0; the rest is divided over the other stages", kind=int
    )
    pp_layers: str | None = option(
        None, "language layers of each stage, as in 1,10,10,7; with VP one list a chunk, "
        "[[0,1],[4,3]]; default: those of the checkpoint, else evenly", kind=str
    )
    vit_pp_layers: str | None = option(
        None, "the same of the vision layers; default: those of the checkpoint, else all on stage "
        "0", kind=str
    )
    distributed_timeout_minutes: float = option(
        10.0, "minutes a collective may take before the job is given up"
    )

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)

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
            ep=self.expert_model_parallel_size,
            etp=self.expert_tensor_parallel_size,
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
        None, "longest row with packing-buffer-size 0; default: seq-length", kind=int
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
    calculate_per_token_loss: bool | None = option(
        None, "that default by its name in Megatron-LM", kind=bool
    )
    exit_interval: int | None = option(
        None, "end after a step that is a multiple of this, saved and with code 0", kind=int
    )
    exit_duration_in_mins: float | None = option(
        None, "end after the step in which so many minutes are over, saved and with code 0",
        kind=float
    )

    early_stop: int | None = option(
        None, "end after so many validations without a better one, by save-best, else by "
        "eval_loss; saved and with code 0", kind=int
    )

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)
        # Megatron-LM has a third loss, whose weight of a token depends on its microbatch.
        if self.calculate_per_token_loss is self.calculate_per_sample_loss:
            raise InputError(
                "calculate-per-token-loss and calculate-per-sample-loss are the two losses there "
                "are; give one of them."
            )
        pad = self.max_padding_length
        if pad is not None and pad > self.seq_length:
            raise InputError(
                f"max-padding-length {pad} must be between 1 and seq-length "
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
    use_distributed_optimizer: bool = option(True, "share optimizer state over data ranks")
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
        check_bounds(self, BOUNDS)
        if self.min_lr > self.lr:
            raise InputError(f"min-lr {self.min_lr} must be between 0 and lr {self.lr}.")
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            raise InputError(
                "overlap-param-gather needs use-distributed-optimizer and overlap-grad-reduce; "
                "give both, or leave it out."
            )
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            raise InputError(
                "lr-warmup-iters and lr-warmup-fraction exclude one another; give one of them."
            )
        for name in ("vit_lr", "merger_lr"):
            if getattr(self, name) and not self.lr:
                raise InputError(
                    f"{name.replace('_', '-')} is {getattr(self, name)} but lr is 0, whose "
                    f"schedule it scales; give an lr, and freeze what shall not change."
                )

    def lr_ratio(self, part: str) -> float:
        """The learning rate of a part, a key of PARTS, as a multiple of lr at every step."""
        own = {VISION: self.vit_lr, MERGER: self.merger_lr}.get(part)
        return 1.0 if own is None or own == self.lr else own / self.lr


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRunOptions:
    """Precision, memory, and what is trained."""

    bf16: bool | None = option(
        None, "parameters and activations in bfloat16, optimizer in fp32; default: the precision "
        "that a resumed run had, else the dtype of config.json", kind=bool
    )
    fp16: bool | None = option(
        None, "parameters and activations in float16 with loss scaling", kind=bool
    )
    fp32: bool | None = option(
        None, "all in float32, whatever the dtype of config.json", kind=bool
    )
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
        None, "recompute activations in backward: norms, activation functions and attention that "
        "no flash kernel computes; or whole layers",
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
    cross_entropy_chunks: int | None = option(
        None, "parts of a microbatch's positions that have logits in turn, computed again in "
        "backward; default: as many as keep logits below a tenth of a rank's memory", kind=int,
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
    train_constants: bool = option(
        False, "train also the weights that the published model declares constant, such as stored "
        "positions; a published fine-tuning script may do so"
    )
    init_method_std: float | None = option(
        None, "standard deviation of random weights; default: config.json's", kind=float
    )
    deterministic: bool = option(
        False, "the same bits at every run of the same command; slower on a GPU"
    )
    seed: int = option(1234, "of weights, data order and everything else random")

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)
        given = [name for name in PRECISIONS if getattr(self, name)]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude one another; give one of them.")
        if self.fp8_format and self.dtype not in (None, "bfloat16"):
            raise InputError("fp8-format is for bf16 training; add bf16.")
        if self.fp8_format and "selective" in (
            self.recompute_granularity, self.vit_recompute_granularity
        ):
            raise InputError(
                "recompute-granularity selective has nothing to recompute with fp8-format, where "
                "TransformerEngine keeps the inputs of its layers in 8 bits; use full."
            )
        if len(self.frozen) == len(PARTS):
            raise InputError(
                "freeze-vit, freeze-merger and freeze-llm together leave nothing to train; leave "
                "out one of them."
            )
        if self.cpu_offloading and (
            self.recompute_granularity or self.vit_recompute_granularity in ("selective", "full")
        ):
            raise InputError(
                "cpu-offloading and recompute-granularity exclude one "
                "another; use recompute-granularity full alone, which needs the least memory."
            )

    @property
    def dtype(self) -> str | None:
        """Of parameters and activations; None where no option says it."""
        given = [dtype for name, dtype in PRECISIONS.items() if getattr(self, name)]
        if given:
            return given[0]
        return None if self.bf16 is None else "float32"  # no-bf16 has always said so

    def with_dtype(self, dtype: str) -> ModelRunOptions:
        """The same with its precision said."""
        return replace(self, **{name: PRECISIONS[name] == dtype for name in PRECISIONS})

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
        1024, "samples packed together into rows of seq-length; 0: one sample a row"
    )
    max_patches_per_row: int | None = option(
        None, "vision patches of a row at most, to even out the vision tower's work", kind=int
    )
    truncate_samples: bool = option(
        False, "cut text off the end of a sample that is longer than a row, instead of skipping "
        "it; an image or video is never cut"
    )
    max_skipped_samples: int = option(
        100, "samples that cannot be used and are skipped, before the run stops; 0: none"
    )
    train_on_prompt: bool = option(
        _TEXT["train_on_prompt"], "train on every token, not on the answers alone"
    )
    mask_history: bool = option(
        _TEXT["mask_history"], "train on the last answer of a conversation alone"
    )
    image_min_pixels: int | None = option(
        _MEDIA["image_min_pixels"],
        "least pixels of a resized image; default: preprocessor_config.json's", kind=int
    )
    image_max_pixels: int | None = option(
        _MEDIA["image_max_pixels"],
        "most pixels of a resized image; default: preprocessor_config.json's", kind=int
    )
    video_min_pixels: int | None = option(
        _MEDIA["video_min_pixels"],
        "least pixels of a video's resized frame; default: the model's own files", kind=int
    )
    video_max_pixels: int | None = option(
        _MEDIA["video_max_pixels"],
        "most pixels of a video's resized frame; default: the model's own files", kind=int
    )
    video_fps: float = option(_MEDIA["video_fps"], "frames taken from a second of video")
    video_maxlen: int = option(_MEDIA["video_maxlen"], "frames taken from one video at most")
    video_positions: str = option(
        _MEDIA["video_positions"], "text after a video goes on behind its last frame, as the "
        "model was trained; transformers5: behind its longest side, as transformers 5 has it",
        choices=("published", "transformers5"),
    )
    shuffle_buffer_size: int = option(1000, "samples shuffled together")
    max_samples_per_sequence: int = option(100, "samples read in a row from one shard")
    eval_interval: int = option(1000, "steps between validations; 0: never")
    eval_iters: int | None = option(
        None, "batches of one validation; 0: never validate; default: the whole split", kind=int
    )

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)

    @property
    def packs(self) -> bool:
        """Whether a row holds several samples."""
        return self.packing_buffer_size > 0

    @property
    def validates(self) -> bool:
        """Whether there is any validation."""
        return self.eval_interval > 0 and self.eval_iters != 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultOptions:
    """What happens when something fails."""

    max_restarts: int = option(
        3, "times that the processes are started again after one of them failed; a run without "
        "save never is"
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
        check_bounds(self, BOUNDS)
        if self.skip_grad_spikes and not self.skip_grad_spikes > 1:
            raise InputError(
                f"skip-grad-spikes is {self.skip_grad_spikes}; give a factor above 1, as 10, or 0 "
                f"for never."
            )


GROUPS = {
    "parallel": ParallelOptions,
    "tp_overlap": TpOverlapOptions,
    "batch": BatchOptions,
    "optimizer": OptimizerOptions,
    "model": ModelRunOptions,
    "offload": OffloadOptions,
    "lora": LoraOptions,
    "experts": ExpertsOptions,
    "data": DataOptions,
    "checkpoint": CheckpointOptions,
    "fault": FaultOptions,
    "log": LogOptions,
}
