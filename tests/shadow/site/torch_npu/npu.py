"""torch.npu of the shadow device: the names of torch.cuda that torch_npu has.

There is no nvtx, cudart, nccl, is_tf32_supported or get_arch_list.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import time

import torch
from shadow import device as shadow

default_generators = (shadow.generator,)


class Config:
    """torch.npu.config."""

    allow_internal_format = True


compile_modes: list[bool] = []


def set_compile_mode(jit_compile: bool = False) -> None:
    compile_modes.append(jit_compile)


# ---- devices ------------------------------------------------------------------------------------


def get_device_name(device=None) -> str:
    return os.environ.get("SHADOW_NPU", "Ascend910B2")


def is_available() -> bool:
    return device_count() > 0


def device_count() -> int:
    return int(bool(get_device_name()) and os.environ.get("ASCEND_RT_VISIBLE_DEVICES") != "")


def get_device_capability(device=None) -> None:
    """None unless TORCH_NPU_DEVICE_CAPABILITY is set."""


def init() -> None:
    """There is nothing to start."""


_lazy_init = init


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def current_device() -> int:
    return 0


def set_device(device) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    if index not in (None, 0):
        raise RuntimeError(f"Invalid device ID: {index}")


def synchronize(device=None) -> None:
    shadow.count_wait("synchronize")


def is_bf16_supported() -> bool:
    return True


# ---- memory -------------------------------------------------------------------------------------


def max_memory_allocated(device=None) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


memory_allocated = memory_reserved = max_memory_reserved = max_memory_allocated


def memory_stats(device=None) -> dict[str, int]:
    return {"allocated_bytes.all.peak": max_memory_allocated()}


def mem_get_info(device=None) -> tuple[int, int]:
    """Free bytes, and all of them: those of the host."""
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")


def reset_peak_memory_stats(device=None) -> None:
    """The host's cannot be reset."""


def empty_cache() -> None:
    """Nothing is kept."""


# ---- streams ------------------------------------------------------------------------------------


class Stream:
    """What is queued has run already."""

    def __init__(self, device=None, priority=0, **kwargs):
        self.device_index = 0

    def wait_event(self, event) -> None:
        assert isinstance(event, Event)

    def wait_stream(self, stream) -> None:
        assert isinstance(stream, Stream)

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        shadow.count_wait("synchronize a stream")


class Event:
    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self.enable_timing, self.at = enable_timing, None

    def record(self, stream=None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream=None) -> None:
        assert stream is None or isinstance(stream, Stream)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        shadow.count_wait("synchronize an event")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        if not (self.enable_timing and end.enable_timing):
            raise RuntimeError("both events must be made with enable_timing")
        return (end.at - self.at) * 1000


_streams = [Stream()]


def current_stream(device=None) -> Stream:
    return _streams[-1]


def default_stream(device=None) -> Stream:
    return _streams[0]


@contextlib.contextmanager
def stream(one):
    if one is None:
        yield
        return
    _streams.append(one)
    yield
    _streams.pop()


# ---- random numbers -----------------------------------------------------------------------------


def get_rng_state(device=shadow.TYPE) -> torch.Tensor:
    assert torch.device(device).type == shadow.TYPE, device
    return shadow.generator.get_state()


def set_rng_state(new_state: torch.Tensor, device=shadow.TYPE) -> None:
    assert torch.device(device).type == shadow.TYPE, device
    shadow.generator.set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state()]


def set_rng_state_all(new_states) -> None:
    (state,) = new_states
    set_rng_state(state)


def manual_seed(seed: int) -> None:
    shadow.generator.manual_seed(int(seed))


manual_seed_all = manual_seed


def initial_seed() -> int:
    return shadow.generator.initial_seed()


# ---- collectives --------------------------------------------------------------------------------


def refuse_bitwise_reductions() -> None:
    """As hccl does; its operators here do not see the operation."""
    bitwise = torch.distributed.ReduceOp.BAND, torch.distributed.ReduceOp.BOR
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
        own = getattr(torch.distributed, name)

        @functools.wraps(own)
        def reduce(first, *args, own=own, **kwargs):
            if shadow.is_shadow(first.device) and any(
                    one in bitwise for one in (*args, *kwargs.values())
                    if isinstance(one, type(bitwise[0]))):
                raise RuntimeError("Unsupported HCCL Reduce Op")
            return own(first, *args, **kwargs)

        setattr(torch.distributed, name, reduce)
