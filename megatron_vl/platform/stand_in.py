"""What Megatron-Core asks CUDA, answered for a device of another kind.

Megatron-Core names CUDA in five ways; each gets its meaning for the device here, once, for the life
of the process, and never where a CUDA device is:

1. the `torch.cuda` state calls: the current device answers the device, synchronisation, streams and
   profiler ranges do nothing, `Tensor.cuda()` moves there;
2. the random-number calls: the CUDA generator is torch's default CPU generator;
3. factory calls with `device="cuda"`: the device becomes the one given;
4. dtype names: `Tensor.type()` answers the CUDA name that Megatron-Core compares with;
5. numbers for the host: those of tokens on their way to experts come to it from the device, and not
   from CUDA alone.

A device whose operators run in order and draw their numbers on the CPU needs no more. One with
streams, memory and generators of its own gives the module that has them, its torch.cuda, for 1
and 2.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from types import ModuleType

import torch

_FACTORIES = (
    "arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "rand_like",
    "randint", "randn", "randn_like", "tensor", "zeros", "zeros_like",
)


def install_stand_in(device: torch.device, own: ModuleType | None = None) -> None:
    """Let Megatron-Core find `device` wherever it looks for CUDA; imports it. Not to be repeated.

    Args:
        own: the device's module, as torch.npu; None: its operators run in order, on the CPU's
            generator. It may have been copied over torch.cuda, which then seems available.

    Raises:
        AssertionError: there is a CUDA device.
    """
    if own is None and torch.cuda.is_available():
        raise AssertionError("nothing may stand in for CUDA where CUDA is available")
    import_megatron_core()
    _install_device_calls(device)
    if own is None:
        torch.Tensor.record_stream = _nothing()
        _install_one_generator()
    else:
        _install_calls_of(own, device.type)
    _install_factories(device, pins=own is not None)
    _install_type_names(device)
    _install_host_numbers()


# ---- 1. device calls --------------------------------------------------------------------------


class _NoStream:
    """Stands for a CUDA stream or event: the device's work is in order already."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        return self

    def wait(self, *args):
        pass

    wait_event = wait_stream = synchronize = wait

    def record_event(self, event=None):
        return event or self

    def query(self):
        return True

    def elapsed_time(self, other):
        raise NotImplementedError("CUDA event timing has no CPU meaning; use time.perf_counter")


def _nothing():
    """A new function that does nothing: torch.compile's tables want every name its own object."""
    return lambda *args, **kwargs: None


def import_megatron_core() -> None:
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


def _install_device_calls(device: torch.device) -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: device
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

    tensor_to, module_to = torch.Tensor.to, torch.nn.Module.to

    def there(one):
        return device if _is_cuda(one) else one

    @functools.wraps(tensor_to)
    def to(self, *args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = there(kwargs["device"])
        return tensor_to(self, *map(there, args), **kwargs)

    torch.Tensor.to = to
    torch.Tensor.cuda = lambda self, *args, **kwargs: tensor_to(self, device)
    torch.nn.Module.cuda = lambda self, *args, **kwargs: module_to(self, device)


# ---- 2. random numbers ------------------------------------------------------------------------


def _install_one_generator() -> None:
    generator = torch.default_generator

    def get_state(device=None):
        return generator.get_state()

    def set_state(state, device=None):
        generator.set_state(state)

    # torch.manual_seed itself calls torch.cuda.manual_seed_all: going through the generator ends
    # what would otherwise recurse for ever.
    def manual_seed(seed):
        generator.manual_seed(int(seed))

    # torch.manual_seed has just seeded the one generator there is.
    _install_random_calls(get_state, set_state, manual_seed, manual_seed_all=_nothing())
    from megatron.core.tensor_parallel import random as megatron_random

    # `fork` warns when the CPU generator moved inside a CUDA fork; here they are one generator.
    megatron_random.logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _install_random_calls(get_state, set_state, manual_seed, manual_seed_all) -> None:
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state, module.set_rng_state = get_state, set_state
        module.manual_seed, module.manual_seed_all = manual_seed, manual_seed_all
    from megatron.core.tensor_parallel import random as megatron_random

    def get_tracked(device="cuda", clone=False, graph_safe=False):
        return get_state()

    def set_tracked(new_state, device=-1, graph_safe=False):
        set_state(new_state)

    megatron_random._get_cuda_rng_state = get_tracked
    megatron_random._set_cuda_rng_state = set_tracked


# ---- 1 and 2 of a device with a module of its own ------------------------------------------------


def _install_calls_of(own: ModuleType, kind: str) -> None:
    """A process has one device: an index, or the name of CUDA, means the current one."""
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device(kind, own.current_device())
    for name in (
        "synchronize", "set_device", "empty_cache", "reset_peak_memory_stats", "memory_allocated",
        "max_memory_allocated", "memory_reserved", "Stream", "current_stream",
        "default_stream", "stream",
    ):
        setattr(cuda, name, getattr(own, name))

    def event(*args, external=False, **options):
        """`external`, which torch.cuda alone knows, is for graphs of recorded operations."""
        return own.Event(*args, **options)

    cuda.Event = event
    # Asked for its first number wherever CUDA seems to be there; an NPU's is None.
    cuda.get_device_capability = lambda device=None: (0, 0)
    _install_random_calls(
        lambda device=None: own.get_rng_state(),
        lambda state, device=None: own.set_rng_state(state),
        own.manual_seed, own.manual_seed_all,
    )


# ---- 3. factories -----------------------------------------------------------------------------


def _install_factories(target: torch.device, *, pins: bool) -> None:
    # `with torch.device(...)` knows factories by identity and remembers them at its first use. It
    # must remember torch's own: else models built on the meta device would be left unset.
    from torch.utils._device import _device_constructors

    _device_constructors()

    def not_on_cuda(factory):
        @functools.wraps(factory)
        def make(*args, **kwargs):
            device = kwargs.get("device")
            if device is not None and _is_cuda(device):
                kwargs["device"] = target
            if kwargs.get("pin_memory") and not pins:
                kwargs["pin_memory"] = False  # page-locking is for copies to a device
            return factory(*args, **kwargs)

        return make

    for name in _FACTORIES:
        setattr(torch, name, not_on_cuda(getattr(torch, name)))


# ---- 4. type names ----------------------------------------------------------------------------


def _install_type_names(device: torch.device) -> None:
    tensor_type = torch.Tensor.type
    own = "torch." if device.type == "cpu" else f"torch.{device.type}."

    @functools.wraps(tensor_type)
    def type_name(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return tensor_type(self, dtype, *args, **kwargs)
        name = tensor_type(self)
        # Only the asking side inside Megatron-Core sees the CUDA name.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("megatron.core") and name.startswith(own):
            return name.replace(own, "torch.cuda.", 1)
        return name

    torch.Tensor.type = type_name


# ---- 5. numbers for the host --------------------------------------------------------------------


def _install_host_numbers() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    @functools.wraps(moe_utils.maybe_move_tensor_to_cpu)
    def on_host(tensor, as_numpy=False, record_stream=False):
        if not torch.is_tensor(tensor):
            return tensor
        return tensor.cpu().numpy() if as_numpy else tensor.cpu()

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = on_host
