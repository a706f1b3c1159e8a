"""Between which numbers every option of a run may be: what is taken here, a start takes."""

from __future__ import annotations

from megatron_vl.data.options import BOUNDS as DATA
from megatron_vl.errors import Bounds

_WAIT = 20_000  # minutes, two weeks; what waits counts milliseconds in 32 bits
_RANKS = Bounds(least=1, most=2**20)
_STEPS = Bounds(least=1, most=10**9)
_STEPS_OR_NONE = Bounds(least=0, most=10**9)
_LAYERS = Bounds(least=1, most=10_000)
_SCALE = Bounds(least=0, most=10**6)
_BELOW_ONE = Bounds(least=0, below=1)

BOUNDS = DATA | {
    "tensor_model_parallel_size": _RANKS, "pipeline_model_parallel_size": _RANKS,
    "num_virtual_stages_per_pipeline_rank": _RANKS, "context_parallel_size": _RANKS,
    "expert_model_parallel_size": _RANKS, "expert_tensor_parallel_size": _RANKS,
    "decoder_first_pipeline_num_layers": Bounds(least=0, most=10_000),
    "distributed_timeout_minutes": Bounds(least=0.01, most=_WAIT),
    "hang_timeout": Bounds(least=0, most=60 * _WAIT),
    "global_batch_size": Bounds(least=1, most=2**30),
    "train_iters": _STEPS, "train_samples": Bounds(least=1, most=10**12),
    "exit_interval": _STEPS, "exit_duration_in_mins": Bounds(above=0, most=10**9),
    "num_train_epochs": Bounds(above=0, most=10**6),
    "lr": _SCALE, "min_lr": _SCALE, "vit_lr": _SCALE, "merger_lr": _SCALE,
    "lr_warmup_iters": _STEPS_OR_NONE, "lr_warmup_fraction": _BELOW_ONE, "lr_decay_iters": _STEPS,
    "weight_decay": _SCALE, "adam_beta1": _BELOW_ONE, "adam_beta2": _BELOW_ONE,
    "adam_eps": Bounds(above=0, most=1), "clip_grad": Bounds(least=0, most=10**12),
    "optimizer_offload_fraction": Bounds(least=0, most=1),
    "initial_loss_scale": Bounds(above=0, most=2**32),
    "recompute_num_layers": _LAYERS, "vit_recompute_num_layers": _LAYERS,
    "cpu_offloading_num_layers": _LAYERS, "cross_entropy_chunks": DATA["seq_length"],
    "init_method_std": _SCALE, "min_offloaded_tensor_size": Bounds(least=1, most=2**40),
    "lora_rank": Bounds(least=1, most=2**16), "lora_alpha": Bounds(above=0, most=10**6),
    "lora_dropout": _BELOW_ONE, "lora_lr_ratio": Bounds(above=0, most=10**4),
    "moe_aux_loss_coeff": _SCALE, "moe_z_loss_coeff": _SCALE,
    "moe_expert_capacity_factor": Bounds(above=0, most=10**6),
    "eval_interval": _STEPS_OR_NONE, "eval_iters": _STEPS_OR_NONE,
    "save_interval": _STEPS, "export_hf_interval": _STEPS, "save_total_limit": _STEPS,
    "early_stop": _STEPS,
    "max_restarts": Bounds(least=0, most=10**6), "max_skipped_steps": _STEPS_OR_NONE,
    "skip_grad_spikes": _SCALE,
    "log_interval": _STEPS, "device_peak_tflops": Bounds(above=0, most=10**9),
    "profile_step_start": _STEPS, "profile_step_end": _STEPS,
    "profile_ranks": Bounds(least=0, most=2**20 - 1),
}  # fmt: skip
