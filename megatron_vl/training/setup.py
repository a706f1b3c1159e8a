"""Model, optimizer and schedule of this rank, from a Plan."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator

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
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megatron_vl.models.common.parts import PARTS, part_of
from megatron_vl.models.common.pipeline_model import sum_tied, sum_vision
from megatron_vl.models.common.router import forget_batch
from megatron_vl.models.common.transformer_config import ModelOptions
from megatron_vl.models.registry import family
from megatron_vl.peft.lora import attach, is_second
from megatron_vl.platform import Platform
from megatron_vl.platform.user_buffers import initialize_user_buffers
from megatron_vl.training.activations import cross_entropy_chunks
from megatron_vl.training.options.groups import OptimizerOptions
from megatron_vl.training.plan import Plan


def fuses(plan: Plan, platform: Platform) -> bool:
    """Whether elementwise operations are computed by kernels of their own."""
    return plan.config.model.fused_ops == "auto" and platform.fuses_ops


def model_options(
    plan: Plan, platform: Platform, *, initialize_weights: bool
) -> ModelOptions:
    run = plan.config.model
    return ModelOptions(
        params_dtype=getattr(torch, run.dtype),
        attention_backend=run.attention_backend,
        recompute=plan.recompute,
        vit_recompute=plan.vit_recompute,
        fp8_format=run.fp8_format,
        cpu_offloading=run.cpu_offloading,
        cpu_offloading_num_layers=run.cpu_offloading_num_layers,
        offload_modules=plan.config.offload.offload_modules,
        min_offloaded_tensor_size=plan.config.offload.min_offloaded_tensor_size,
        tp_overlap=plan.config.tp_overlap.megatron_core,
        cross_entropy_chunks=cross_entropy_chunks(plan),
        fused_ops=fuses(plan, platform),
        initialize_weights=initialize_weights,
        row_lengths_vary=plan.row_multiple is not None,
        deterministic=run.deterministic,
        frozen=plan.trainable.frozen,
        adapted=plan.trainable.adapted,
        train_constants=run.train_constants,
        quantize_base=plan.config.lora.quantize_base,
        moe_grouped_gemm=plan.config.experts.moe_grouped_gemm,
        balance=plan.balance,
    )


def make_user_buffers(plan: Plan) -> None:
    """Those of `plan`'s language layers."""
    config, layout = plan.config, plan.layout
    initialize_user_buffers(
        (plan.row_length * config.batch.micro_batch_size // layout.cp,
         plan.spec.decoder.hidden_size),
        tp=layout.tp, dtype=getattr(torch, config.model.dtype),
        fp8=config.model.fp8_format is not None, settings=config.tp_overlap.settings(),
        bootstrap_backend=config.tp_overlap.tp_comm_bootstrap_backend,
    )


def build_model(plan: Plan, platform: Platform, *, initialize_weights: bool) -> list:
    """This rank's chunks on its device, each wrapped for data parallelism."""
    if plan.config.tp_overlap.tp_comm_overlap:
        make_user_buffers(plan)
    options = model_options(plan, platform, initialize_weights=initialize_weights)
    chunks = family(plan.spec.model_type).build_model(plan.spec, plan.layout, plan.split, options)
    if plan.trainable.adapter is not None:
        attach(chunks, plan.trainable.adapter, plan.layout, plan.split, seed=plan.config.model.seed)
    run = plan.config.optimizer
    return wrap_for_data_parallel(
        chunks,
        platform.device(int(os.environ.get("LOCAL_RANK", 0))),
        overlap_grad_reduce=run.overlap_grad_reduce,
        overlap_param_gather=run.overlap_param_gather,
        use_distributed_optimizer=run.use_distributed_optimizer,
        grad_reduce_in_fp32=not run.grad_reduce_in_bf16,
    )


def wrap_for_data_parallel(
    chunks: list, device, *, overlap_grad_reduce: bool, overlap_param_gather: bool = False,
    use_distributed_optimizer: bool = False, grad_reduce_in_fp32: bool = True,
) -> list:
    """The chunks on `device` with their gradient buffers, and their hooks into the schedules."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=grad_reduce_in_fp32,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        use_distributed_optimizer=use_distributed_optimizer,
    )
    model = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=ddp,
            module=chunk.to(device),
            # Later chunks finish their backward first; one bucket each keeps the order simple.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]
    for chunk in model:
        chunk.config.finalize_model_grads_func = _finalize_gradients
    if overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in model]
        model[0].config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return model


def schedule_change(scheduler: OptimizerParamScheduler, saved: dict) -> str:
    """What a schedule of another length than a checkpoint's does; empty where it is as long.

    Args:
        scheduler: this run's, at the checkpoint's step.
        saved: the state of the checkpoint's own.
    """
    if saved["lr_decay_steps"] == scheduler.lr_decay_steps:
        return ""
    old = copy.copy(scheduler)
    for name, value in saved.items():
        setattr(old, name, value)
    return (
        f"the learning rate's schedule ends after {scheduler.lr_decay_steps} steps, the "
        f"checkpoint's after {saved['lr_decay_steps']}: the rate goes on at "
        f"{scheduler.get_lr({}):.3e} instead of {old.get_lr({}):.3e}"
    )


@contextlib.contextmanager
def whole_weights(model: list) -> Iterator[None]:
    """Every weight as the last update left it on every rank, and nothing gathered meanwhile.

    With overlap-param-gather ranks have but their parts of the last update until the next forward
    asks for a weight; data ranks that do not run the same forwards may not ask.
    """
    behind = [chunk for chunk in model if chunk.ddp_config.overlap_param_gather]
    for chunk in behind:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in behind:
            chunk.enable_forward_pre_hook()


def _finalize_gradients(model: list, *args, **options) -> None:
    finalize_model_grads(model, *args, **options)
    chunks = [chunk.module for chunk in model]
    sum_tied(chunks, "main_grad")
    sum_vision(chunks, "main_grad")
    forget_batch(chunks)


def build_optimizer(plan: Plan, model: list, platform: Platform):
    """Megatron-Core's optimizer and schedule over `model`, and its loss scale in the schedules.

    Mixed precision copies the weights here; after loading others call `reload_model_params`.
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
        overlap_param_gather=options.overlap_param_gather,
        initial_loss_scale=options.initial_loss_scale,
        **_offload(options, platform),
    )
    rates = _rate_overrides(options, plan.config.lora.lora_lr_ratio)
    optimizer = get_megatron_optimizer(
        config, model, config_overrides=get_standard_config_overrides(config) | rates
    )
    if not config.optimizer_cpu_offload:  # Megatron-Core's hybrid optimizer starts its own
        _start_state(optimizer)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=plan.config.warmup_iters,
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
    return optimizer, scheduler


def _rate_overrides(
    options: OptimizerOptions, second: float
) -> dict[ParamKey, ParamGroupOverride]:
    """What sets the parameter groups with a learning rate of their own apart.

    Args:
        second: the rate of an adapter's second factors over that of its first ones.
    """

    def key(part: str, of_second: bool) -> ParamKey:
        def is_of(_, name: str) -> bool:  # named by the data-parallel wrapper
            name = name.removeprefix("module.")
            return part_of(name) == part and is_second(name) == of_second

        name = f"{part}, second factors" if of_second else part
        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=is_of))

    ratios = {(part, of_second): options.lr_ratio(part) * (second if of_second else 1)
              for part in PARTS for of_second in (False, True)}
    return {
        # The schedule reads the rates alone; by `lr_mult` a checkpoint's groups are told apart.
        key(*of): dict(max_lr=options.lr * ratio, min_lr=options.min_lr * ratio, lr_mult=ratio)
        for of, ratio in ratios.items() if ratio != 1
    }


def _offload(options: OptimizerOptions, platform: Platform) -> dict:
    """Megatron-Core's hybrid optimizer, where there is another memory than the host's."""
    if not options.optimizer_cpu_offload or platform.in_host_memory:
        return {}
    return dict(
        optimizer_cpu_offload=options.optimizer_offload_fraction > 0,
        optimizer_offload_fraction=options.optimizer_offload_fraction,
        # It keeps the fp32 weights itself; only so its state can be saved and loaded.
        use_precision_aware_optimizer=options.optimizer_offload_fraction > 0,
    )


def _start_state(optimizer) -> None:
    """Adam's moments at zero before the first update.

    While updates are skipped, for a loss scale that is still too large or a gradient that is no
    number, the moments would not exist yet; a checkpoint of such a step could not be written.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(one, "is_stub_optimizer", False):  # of a rank that trains nothing
            continue
        one.init_state_fn(one.optimizer, one.config)
        for group in one.optimizer.param_groups:
            group.setdefault("step", 0)
