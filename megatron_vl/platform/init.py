"""Start torch.distributed and Megatron-Core's process groups from a Layout."""

from __future__ import annotations

import gc
import os
import re
import socket
from datetime import timedelta

import torch

from megatron_vl.errors import InputError
from megatron_vl.parallel import Layout
from megatron_vl.platform.base import Platform, select_platform


def initialize(
    layout: Layout, *, embedding_stage: int = 0, seed: int = 1234, timeout_minutes: float = 10.0
) -> Platform:
    """Start this process's share of `layout`, with the word embedding on stage `embedding_stage`.

    Reads RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; without them the process is the
    only one. Seeds torch, and Megatron-Core's random tracker, which starts tensor-parallel ranks
    apart and data-parallel ranks alike.

    Raises:
        InputError: the world has another size than the layout.
    """
    platform = select_platform()
    platform.install()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != layout.world_size:
        raise InputError(
            f"{world} processes were started but the layout {layout} needs {layout.world_size}; "
            f"start {layout.world_size} with torchrun, or change tp, pp, cp."
        )
    connect(timeout_minutes=timeout_minutes)
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.expert_tp,
            get_embedding_ranks=lambda ranks: sorted({ranks[embedding_stage], ranks[-1]}),
            # The distributed optimizer gathers its state over gloo when it saves.
            create_gloo_process_groups=True,
            distributed_timeout_minutes=timeout_minutes,
        )
    seed_everything(seed)
    return platform


def be_deterministic() -> None:
    """Make torch refuse kernels that may add in another order at every run.

    To be called before `connect`: cuBLAS, NCCL and HCCL read their variables once, when they start.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("HCCL_DETERMINISTIC", "true")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def connect(*, timeout_minutes: float = 10.0) -> None:
    """Join the run's other processes: torch.distributed over this platform's backend. Idempotent.

    Raises:
        InputError: some never came to MASTER_ADDR:MASTER_PORT in time; they are named. Or one
            cannot connect to another, over gloo.
    """
    if torch.distributed.is_initialized():
        return
    platform = select_platform()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    platform.device(int(os.environ.get("LOCAL_RANK", 0)))  # selected before NCCL looks for it
    timeout = timedelta(minutes=timeout_minutes)
    if "MASTER_ADDR" in os.environ:
        store = _gather(rank, world, timeout)
    else:
        store = torch.distributed.HashStore()
    try:
        torch.distributed.init_process_group(
            platform.collective_backend,
            rank=rank,
            world_size=world,
            store=torch.distributed.PrefixStore("default_pg", store),
            timeout=timeout,
            # No device_id: with it NCCL splits the world for every group, which all ranks must
            # join, and `new_group(.., use_local_synchronization=True)` of some waits for ever.
        )
    except RuntimeError as error:  # gloo has no class for it
        found = re.search(r"connectFullMesh failed.*remote=\[(.*?)\]", str(error), re.DOTALL)
        if found is None:
            raise
        raise InputError(
            f"rank {rank} on {socket.gethostname()} could not connect to another rank at "
            f"{found[1]}; every host's name has to be an address that the others reach, or its "
            f"GLOO_SOCKET_IFNAME such an interface, and no firewall between them."
        ) from error


def current_device() -> torch.device:
    """The device that `Platform.device` has selected for this process."""
    return torch.device(torch.cuda.current_device())


def device_random_state() -> torch.Tensor:
    """Of the device's own generator; on a CPU that is torch's only one."""
    return torch.cuda.get_rng_state()


def set_device_random_state(state: torch.Tensor) -> None:
    """What `device_random_state` gave."""
    torch.cuda.set_rng_state(state)


def barrier() -> None:
    """Wait until every rank of the job is here.

    torch's own guesses which device NCCL is to use where none was bound, and warns of it.
    """
    box = torch.zeros(1, device=current_device())
    torch.distributed.all_reduce(box)
    box.item()  # on a device the sum is only queued


def _gather(rank: int, world: int, timeout: timedelta) -> torch.distributed.Store:
    """The store of the environment's address, once every rank has come to it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's store is there
    within = f"within {timeout.total_seconds() / 60:g} min (distributed-timeout-minutes)"
    here = f"rank {rank} on {socket.gethostname()}"
    try:
        store = torch.distributed.TCPStore(
            address, port, None, rank == 0 and not agent, timeout, wait_for_workers=False,
            multi_tenant=True,
        )
    except torch.distributed.DistNetworkError as error:
        raise InputError(
            f"{here} could not reach the others at {address}:{port} {within}; see whether rank 0 "
            f"runs there and the port is open to this host."
        ) from error
    # A launcher's store outlives ranks that it starts again.
    attempt = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get(
        "TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.PrefixStore("ranks/" + "/".join(attempt), store)
    try:
        store.set(f"came/{rank}", socket.gethostname())
        if store.add("came", 1) == world:
            store.set("all came", "")
        try:
            store.wait(["all came"], timeout)
        except torch.distributed.DistStoreError as error:
            missing = [r for r in range(world) if not store.check([f"came/{r}"])]
            raise InputError(
                f"{ranks(missing)} of {world} never came to {address}:{port} {within}; see what "
                f"they printed, and that they reach that address and port."
            ) from error
    except torch.distributed.DistNetworkError as error:
        raise InputError(
            f"{here} waited for the others at {address}:{port} when rank 0's node left; see what "
            f"it printed."
        ) from error
    return store


def ranks(numbers: list[int]) -> str:
    """`rank 3`, `ranks 0-2, 7`: sorted numbers as a person writes them."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"


def leave_layout() -> None:
    """Undo `initialize` but for the world itself, so that it can be called with another layout."""
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    world = torch.distributed.group.WORLD
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not world:
            torch.distributed.destroy_process_group(group)
    # A model refers to itself, so it and its groups stay until Python looks for such; meanwhile the
    # threads of gloo's ended groups keep the processor busy.
    gc.collect()


def seed_everything(seed: int) -> None:
    """Seed torch and Megatron-Core's tracker; pipeline stages draw different numbers."""
    from megatron.core import parallel_state, tensor_parallel

    seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
