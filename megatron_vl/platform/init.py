"""Start torch.distributed and Megatron-Core's process groups from a Layout."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from megatron_vl.errors import InputError
from megatron_vl.parallel import Layout
from megatron_vl.platform.base import Platform, select_platform


def initialize(
    layout: Layout, *, embedding_stage: int = 0, seed: int = 1234, timeout_minutes: float = 10.0,
    deterministic: bool = False,
) -> Platform:
    """Start this process's share of `layout`, with the word embedding on stage `embedding_stage`.

    Reads RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; without them the process is the
    only one. `deterministic` makes torch refuse kernels that may add in another order at every run.
    Seeds torch, and Megatron-Core's random tracker, which starts tensor-parallel ranks
    apart and data-parallel ranks alike.

    Raises:
        InputError: the world has another size than the layout.
    """
    if deterministic:
        # Before CUDA starts: cuBLAS and NCCL read them once.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    platform = select_platform()
    platform.install()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world != layout.world_size:
        raise InputError(
            f"{world} processes were started but the layout {layout} needs {layout.world_size}; "
            f"start {layout.world_size} with torchrun, or change tp, pp, cp."
        )
    device = platform.device(int(os.environ.get("LOCAL_RANK", 0)))
    if not torch.distributed.is_initialized():
        init = {}
        if "MASTER_ADDR" not in os.environ:
            init = {"store": torch.distributed.HashStore()}
        torch.distributed.init_process_group(
            platform.collective_backend,
            rank=rank,
            world_size=world,
            timeout=timedelta(minutes=timeout_minutes),
            device_id=device if device.type == "cuda" else None,
            **init,
        )
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
            context_parallel_size=layout.cp,
            get_embedding_ranks=lambda ranks: sorted({ranks[embedding_stage], ranks[-1]}),
            # The distributed optimizer gathers its state over gloo when it saves.
            create_gloo_process_groups=True,
            distributed_timeout_minutes=timeout_minutes,
        )
    seed_everything(seed)
    return platform


def leave_layout() -> None:
    """Undo `initialize` but for the world itself, so that it can be called with another layout."""
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    world = torch.distributed.group.WORLD
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not world:
            torch.distributed.destroy_process_group(group)


def seed_everything(seed: int) -> None:
    """Seed torch and Megatron-Core's tracker; pipeline stages draw different numbers."""
    from megatron.core import parallel_state, tensor_parallel

    seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
