"""What this machine, or this program on it, cannot do; imports no Megatron-Core."""

from __future__ import annotations

import importlib.util
import os

from megatron_vl.errors import InputError
from megatron_vl.launch import ascend
from megatron_vl.models.spec import ModelSpec
from megatron_vl.ops.attention import AttentionCase, check_backend
from megatron_vl.parallel import Layout, communicators
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.options.offload import NORMS

KEEPS_WEIGHTS = "NVTE_CPU_OFFLOAD_V1"


def check_machine(config: TrainConfig, spec: ModelSpec) -> None:
    """Raises InputError: something asked for that this machine, or this program on it, cannot do.
    """
    _check_devices(config)
    _check_attention(config, spec)


def _check_devices(config: TrainConfig) -> None:
    from megatron_vl.platform import select_platform  # imports torch

    transformer_engine = importlib.util.find_spec("transformer_engine") is not None
    platform = select_platform()
    if platform.runs_cuda:
        _check_offload(config, transformer_engine)
        if transformer_engine:
            _check_modules(config)
            return
    elif config.optimizer.optimizer_cpu_offload and not platform.in_host_memory:
        raise InputError(
            f"optimizer-cpu-offload is for CUDA devices, which Megatron-Core looks for to offload "
            f"from, and not for {platform.name}; use use-distributed-optimizer, which shares the "
            f"state over data ranks."
        )
    for option, asked, instead in (
        ("fp8-format", config.model.fp8_format, "bf16"),
        ("cpu-offloading", config.model.cpu_offloading,
         "recompute-granularity full"),
        ("tp-comm-overlap", config.tp_overlap.tp_comm_overlap, "sequence-parallel alone"),
    ):
        if asked:
            raise InputError(
                f"{option} needs TransformerEngine on a CUDA device and this machine has none; use "
                f"{instead}."
            )


def _check_modules(config: TrainConfig) -> None:
    """Whether TransformerEngine's layers have the modules that are to be offloaded, and keep their
    weights on the device."""
    modules = config.offload.offload_modules
    if not modules or config.lora.quantize_base is not None:  # layers are Megatron-Core's
        return
    if norms := [one for one in modules if one in NORMS]:
        raise InputError(
            f"offload-modules has {' and '.join(norms)}, which TransformerEngine's layers have not "
            f"apart; give qkv_linear instead."
        )
    if os.environ.get(KEEPS_WEIGHTS) != "1":  # read when TransformerEngine is imported
        raise InputError(
            f"offload-modules needs {KEEPS_WEIGHTS}=1 in the environment, without which "
            f"TransformerEngine offloads weights too; export it, and start again."
        )


def _check_attention(config: TrainConfig, spec: ModelSpec) -> None:
    """What needs no look at a device; a rank sees the rest when it builds its layers."""
    for tower in reversed(spec.towers):
        case = AttentionCase.here(
            dtype=config.model.dtype, head_dim=tower.head_dim,
            deterministic=config.model.deterministic, touch_device=False,
        )
        check_backend(config.model.attention_backend, case)


def _check_offload(config: TrainConfig, transformer_engine: bool) -> None:
    """Whether Megatron-Core's hybrid optimizer, which CUDA devices need for it, can be had."""
    options = config.optimizer
    if not options.optimizer_cpu_offload or options.optimizer_offload_fraction == 0:
        return
    option = "optimizer-cpu-offload"
    if not (config.model.bf16 and options.use_distributed_optimizer):
        raise InputError(
            f"{option} on GPUs needs bf16 and use-distributed-optimizer; give "
            f"both, or leave it out."
        )
    if not transformer_engine:
        raise InputError(
            f"{option} on GPUs needs TransformerEngine, which is not installed; install it, or use "
            f"use-distributed-optimizer alone, which shares the state over data ranks."
        )


def communication_buffers(layout: Layout, embedding_stage: int) -> str:
    """What a rank's device holds for its communicators, in words; empty but for HCCL's.

    Raises:
        InputError: a variable of HCCL is no size.
    """
    if not ascend.is_wanted(os.environ) or layout.world_size == 1:
        return ""
    most = max(communicators(layout, stage=stage, embedding_stage=embedding_stage)
               for stage in range(layout.pp))
    return ascend.buffers(most, min(layout.pp - 1, 2), os.environ)
