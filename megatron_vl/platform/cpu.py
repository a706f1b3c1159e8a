"""Megatron-Core on CPU over gloo.

Megatron-Core names CUDA in four ways; each gets its CPU meaning here, once, for the life of the
process, and only when no CUDA device is available:

1. the `torch.cuda` state calls: the current device answers `cpu`, synchronisation, streams and
   profiler ranges do nothing, `Tensor.cuda()` is the identity;
2. the random-number calls: the CUDA generator is torch's default CPU generator;
3. factory calls with `device="cuda"`: the device becomes `cpu`;
4. dtype names: `Tensor.type()` answers the CUDA name that Megatron-Core compares with.

The optimizer is that of a GPU without TransformerEngine: see `platform.optimizer`.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import resource
import sys
import time
import warnings

import torch

from megatron_vl.platform.checkpoints import install_common_reader
from megatron_vl.platform.optimizer import install_optimizer
from megatron_vl.platform.write_results import install_write_results

_FACTORIES = (
    "arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "rand_like",
    "randint", "randn", "randn_like", "tensor", "zeros", "zeros_like",
)
_installed = False


class CpuPlatform:
    name = "cpu"
    collective_backend = "gloo"
    fuses_ops = False  # every process would start a C++ compiler

    def install(self) -> None:
        global _installed
        if _installed:
            return
        if torch.cuda.is_available():
            raise AssertionError("the CPU layer must not be installed where CUDA is available")
        _import_megatron_core()
        _install_device_calls()
        _install_random_calls()
        _install_factories()
        _install_type_names()
        install_optimizer()
        install_write_results()
        install_common_reader()
        _installed = True

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def synchronize(self) -> None:
        """The CPU runs in order; there is nothing to wait for."""

    def peak_memory_bytes(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def device_name(self) -> str:
        return platform.processor() or platform.machine() or "CPU"

    def mark(self) -> float:
        return time.perf_counter()

    def seconds_between(self, start: float, end: float) -> float:
        return end - start


# ---- 1. device calls --------------------------------------------------------------------------


class _NoStream:
    """Stands for a CUDA stream or event: work on the CPU is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        return self

    def wait(self, *args):
        pass

    wait_event = wait_stream = synchronize = record_event = wait

    def query(self):
        return True

    def elapsed_time(self, other):
        raise NotImplementedError("CUDA event timing has no CPU meaning; use time.perf_counter")


def _nothing():
    """A new function that does nothing: torch.compile's tables want every name its own object."""
    return lambda *args, **kwargs: None


def _import_megatron_core() -> None:
    """Import it with its fused helpers left as plain functions.

    They are wrapped in torch.compile when their modules are imported, which would start a C++
    compiler in the first step of every process.
    """
    compile_ = torch.compile
    torch.compile = lambda function=None, **options: function or (lambda f: f)
    try:
        with warnings.catch_warnings():
            # "Apex is not installed", "Falling back to Torch optimizers": known, and mended below.
            warnings.simplefilter("ignore")
            import megatron.core.distributed
            import megatron.core.models.gpt
            import megatron.core.optimizer
            import megatron.core.pipeline_parallel
            import megatron.core.tensor_parallel
            import megatron.core.transformer.transformer_block  # noqa: F401
    finally:
        torch.compile = compile_


def _is_cuda(device) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _install_device_calls() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    for name in (
        "synchronize", "set_device", "empty_cache", "reset_peak_memory_stats", "_lazy_init"
    ):
        setattr(cuda, name, _nothing())
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *args: 0)
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = _NoStream
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _nothing(), _nothing()

    def cuda_is_here(self, *args, **kwargs):
        return self

    torch.Tensor.cuda = cuda_is_here
    torch.nn.Module.cuda = cuda_is_here
    tensor_to = torch.Tensor.to

    @functools.wraps(tensor_to)
    def to(self, *args, **kwargs):
        args = tuple("cpu" if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return tensor_to(self, *args, **kwargs)

    torch.Tensor.to = to


# ---- 2. random numbers ------------------------------------------------------------------------


def _install_random_calls() -> None:
    generator = torch.default_generator

    def get_state(device=None):
        return generator.get_state()

    def set_state(state, device=None):
        generator.set_state(state)

    # torch.manual_seed itself calls torch.cuda.manual_seed_all: going through the generator ends
    # what would otherwise recurse for ever.
    def manual_seed(seed):
        generator.manual_seed(int(seed))

    cuda = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state, module.set_rng_state = get_state, set_state
        module.manual_seed = manual_seed
        # torch.manual_seed has just seeded the one generator there is.
        module.manual_seed_all = _nothing()
    from megatron.core.tensor_parallel import random as megatron_random

    def get_tracked(device="cuda", clone=False, graph_safe=False):
        return generator.get_state()

    def set_tracked(new_state, device=-1, graph_safe=False):
        generator.set_state(new_state)

    megatron_random._get_cuda_rng_state = get_tracked
    megatron_random._set_cuda_rng_state = set_tracked
    # `fork` warns when the CPU generator moved inside a CUDA fork; here they are one generator.
    megatron_random.logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


# ---- 3. factories -----------------------------------------------------------------------------


def _install_factories() -> None:
    # `with torch.device(...)` knows factories by identity and remembers them at its first use. It
    # must remember torch's own: else models built on the meta device would be left unset.
    from torch.utils._device import _device_constructors

    _device_constructors()

    def on_cpu(factory):
        @functools.wraps(factory)
        def make(*args, **kwargs):
            device = kwargs.get("device")
            if device is not None and _is_cuda(device):
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False  # page-locking is for copies to a GPU
            return factory(*args, **kwargs)

        return make

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


# ---- 4. type names ----------------------------------------------------------------------------


def _install_type_names() -> None:
    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def type_name(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return tensor_type(self, dtype, *args, **kwargs)
        name = tensor_type(self)
        # Only the asking side inside Megatron-Core sees the CUDA name.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("megatron.core") and name.startswith("torch."):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    torch.Tensor.type = type_name
