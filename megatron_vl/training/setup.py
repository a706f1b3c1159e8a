"""Model, optimizer and schedule of this rank, from a Plan."""

from __future__ import annotations

import os

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vl.models.common.transformer_config import ModelOptions
from megatron_vl.models.registry import family
from megatron_vl.platform import Platform
from megatron_vl.training.config import TrainConfig
from megatron_vl.training.plan import Plan


def model_options(config: TrainConfig, *, initialize_weights: bool) -> ModelOptions:
    run = config.model
    return ModelOptions(
        params_dtype=getattr(torch, run.dtype),
        attention_backend=run.attention_backend,
        recompute=run.recompute_granularity or "none",
        recompute_method=run.recompute_method,
        recompute_num_layers=run.recompute_num_layers,
        fp8_format=run.fp8_format,
        cpu_offloading=run.cpu_offloading,
        cpu_offloading_num_layers=run.cpu_offloading_num_layers,
        initialize_weights=initialize_weights,
    )


def build_model(plan: Plan, platform: Platform, *, initialize_weights: bool) -> list:
    """This rank's chunks on its device, each wrapped for data parallelism."""
    options = model_options(plan.config, initialize_weights=initialize_weights)
    chunks = family(plan.spec.model_type).build_model(plan.spec, plan.layout, plan.split, options)
    device = platform.device(int(os.environ.get("LOCAL_RANK", 0)))
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=plan.config.optimizer.overlap_grad_reduce,
        use_distributed_optimizer=plan.config.optimizer.use_distributed_optimizer,
    )
    wrapped = []
    for number, chunk in enumerate(chunks):
        chunk.to(device)
        wrapped.append(
            DistributedDataParallel(
                config=chunk.config,
                ddp_config=ddp,
                module=chunk,
                # Later chunks finish their backward first; one bucket each keeps the order simple.
                disable_bucketing=number > 0,
            )
        )
    return wrapped


def build_optimizer(plan: Plan, model: list):
    """Megatron-Core's optimizer and schedule over `model`, and its hooks into the schedules.

    Call it after the weights are loaded: mixed precision copies them here.
    """
    options, run = plan.config.optimizer, plan.config.model
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=run.bf16,
        fp16=run.fp16,
        params_dtype=getattr(torch, run.dtype),
        use_distributed_optimizer=options.use_distributed_optimizer,
        # Without a device the optimizer state is in host memory anyway.
        optimizer_cpu_offload=options.optimizer_cpu_offload and torch.cuda.is_available(),
        optimizer_offload_fraction=1.0,
    )
    optimizer = get_megatron_optimizer(
        config, model, config_overrides=get_standard_config_overrides(config)
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_iters,
        lr_decay_steps=plan.config.decay_iters,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=1,  # weight decay is constant
        wd_incr_style="constant",
        # What was asked for; whether it may differ from the checkpoint's is checked while loading.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    for chunk in model:
        chunk.config.grad_scale_func = optimizer.scale_loss
        chunk.config.finalize_model_grads_func = finalize_model_grads
    if options.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in model]
        model[0].config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return optimizer, scheduler
