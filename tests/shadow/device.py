"""An accelerator that is this machine's CPU, under the device type of Ascend's NPUs.

It comes to torch through the same door (PrivateUse1), with a torch.npu of its own: see
site/torch_npu/. A tensor on it is a `Shadow` around a tensor of the CPU, whose kernels compute; so
a run's numbers are those of the CPU, to the bit. What an accelerator, or this one, does not allow
is an error here, and what it has to wait for is counted:

- an operation on tensors of both sides raises, as does sending one through a process group of the
  other;
- so do sums of dtypes that HCCL does not reduce, and norms that NPUs have no kernel for;
- torch's gelu is the form with tanh, whatever is asked for;
- random numbers come from the device's own generator, which is of the CPU's kind;
- `waits` counts each time the host stands still until the device has run what was queued: a value
  that is read, an operation whose result has a size of its own, a copy that was not asked to go on
  behind (`non_blocking`), a synchronization.

As on an NPU, `tensor.double()` is float32, without a word.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

TYPE, BACKEND = "npu", "hccl"
# Their result's shape depends on what is in a tensor, or they are read as a Python value.
_READ = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero"}
_COPIES = {"_to_copy", "copy_", "_foreach_copy_"}

# What HCCL reduces, and what aclnnForeachNorm takes.
_REDUCED = {torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
            torch.float32}
_NORMED = {torch.float16, torch.bfloat16, torch.float32}

# torch knows such a device's index 0 alone, so each process has one.
generator = torch.Generator()
waits: Counter[str] = Counter()  # by the line that made the host wait


class Shadow(torch.Tensor):
    """A tensor of the device, around one of the CPU."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        shadow = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device(TYPE, 0),
        )
        shadow.held = held
        return shadow

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Shadow({self.held})"

    # What torch keeps in the C++ object that stands for a tensor is here the held one's.
    @property
    def data(self) -> Shadow:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        if not isinstance(other, Shadow):
            raise RuntimeError("a tensor of the device was given the data of one on the CPU")
        torch.Tensor.data.__set__(self, other)
        self.held = other.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError("a tensor of the device has no numpy array; copy it to the host first")


class Everywhere(TorchDispatchMode):
    """Sees what makes a tensor on the device although no tensor of the device goes in."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def is_shadow(device: object) -> bool:
    return device is not None and torch.device(device).type == TYPE


def run(func, args: tuple, kwargs: dict):
    """An operator on tensors of the device, or of the CPU alone."""
    from megatron_vl.ops.quantized import QuantizedTensor

    device = kwargs.get("device")
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    if any(isinstance(one, QuantizedTensor) for one in tensors):  # which is asked before a backend
        return QuantizedTensor.__torch_dispatch__(func, (), args, kwargs)
    here = [one for one in tensors if isinstance(one, Shadow)]
    if not here and not is_shadow(device):
        return func(*args, **kwargs)
    name = func.__name__.partition(".")[0]
    if here:
        _refuse_mixed(func, name, tensors)
        _refuse_dtypes(func, name, here, args)
    _count_wait(name, tensors, args, kwargs)
    if func.namespace == "c10d":
        args = _with_twin(args)
    if name in ("gelu", "gelu_backward"):
        kwargs = kwargs | {"approximate": "tanh"}
    kwargs = {key: _each(_held, value) for key, value in kwargs.items()}
    if is_shadow(device):
        kwargs["device"] = "cpu"
    elif name == "_to_copy" and device is None and kwargs.get("dtype") == torch.float64:
        kwargs["dtype"] = torch.float32
    with _drawing(func):
        out = func(*_each(_held, args), **kwargs)
    if device is not None and not is_shadow(device):
        return out
    if name == "copy_" and not isinstance(args[0], Shadow):
        return args[0]
    known = {id(one.held): one for one in here}

    def shadow_of(one: torch.Tensor) -> Shadow:
        shadow = known.get(id(one))
        if shadow is None:
            return Shadow(one)
        if shadow.shape != one.shape:  # resized in place
            torch.Tensor.data.__set__(shadow, Shadow(one))
        return shadow

    return _each(shadow_of, out)


def _tensors(values) -> Iterator[torch.Tensor]:
    for one in values:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from _tensors(one)


def _each(change: Callable, one):
    """`one` with its tensors changed, as operators take and give them: alone or in lists."""
    if isinstance(one, torch.Tensor):
        return change(one)
    if isinstance(one, list | tuple):
        return type(one)([_each(change, part) for part in one])
    return one


def _held(one: torch.Tensor) -> torch.Tensor:
    return one.held if isinstance(one, Shadow) else one


def _refuse_mixed(func, name: str, tensors: list[torch.Tensor]) -> None:
    if name in _COPIES:
        return
    # Of the host a number may come along, where it is one to compute with.
    takes_numbers = torch.Tag.pointwise in func.tags or name.startswith(("_foreach", "_fused"))
    foreign = [one for one in tensors if not isinstance(one, Shadow)
               and not (takes_numbers and one.dim() == 0)]
    if foreign:
        raise RuntimeError(
            f"{func} got tensors of {TYPE} and of the CPU, these of shapes "
            f"{[tuple(one.shape) for one in foreign]}"
        )


def _refuse_dtypes(func, name: str, tensors: list[torch.Tensor], args: tuple) -> None:
    if func.namespace == "c10d" and "reduce" in name:
        known = _REDUCED
    elif name == "_foreach_norm":
        known = _NORMED
    else:
        return
    asked = {one.dtype for one in tensors} | {one for one in args if isinstance(one, torch.dtype)}
    if foreign := asked - known:
        raise RuntimeError(f"{func} has no kernel for {foreign}")


@contextlib.contextmanager
def _drawing(func) -> Iterator[None]:
    """The CPU's generator is the device's while one of its operators draws."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        yield
        return
    cpu = torch.default_generator
    before = cpu.get_state()
    cpu.set_state(generator.get_state())
    yield
    generator.set_state(cpu.get_state())
    cpu.set_state(before)


def _count_wait(name: str, tensors: list, args: tuple, kwargs: dict) -> None:
    if name in _COPIES:
        sides = {isinstance(one, Shadow) for one in tensors}
        if kwargs.get("device") is not None:
            sides.add(is_shadow(kwargs["device"]))
        behind = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
        if len(sides) > 1 and not behind:
            count_wait("copy between host and device")
    elif name in _READ or name.startswith("unique"):
        count_wait(name)
    elif name in ("index", "index_put", "index_put_"):
        masks = [one for one in args[1] if one is not None and one.dtype == torch.bool]
        # One number at the places of one mask is what torch fills there, where nothing is read.
        fills = name != "index" and len(masks) == len(args[1]) == args[2].numel() == 1
        if masks and not fills:
            count_wait(name)
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        count_wait(name)


def count_wait(what: str) -> None:
    """Count that the host waits, at the line of ours or of Megatron-Core's that is to blame."""
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        file = frame.f_code.co_filename
        for package in ("megatron_vl", "megatron"):
            at = file.rfind(f"/{package}/")
            if at >= 0 and not file.endswith("platform/stand_in.py"):
                waits[f"{file[at + 1:]}:{frame.f_code.co_name}: {what}"] += 1
                return
    waits[f"elsewhere: {what}"] += 1


# ---- process groups -----------------------------------------------------------------------------


def make_backend(options, _) -> torch.distributed.ProcessGroupGloo:
    """torch.distributed's backend for the device: gloo, which no tensor of the CPU can reach."""
    return torch.distributed.ProcessGroupGloo(
        options.store, options.group_rank, options.group_size, options.timeout
    )


_twins: dict[str, torch.distributed.ProcessGroup] = {}  # by their names, which are given once


def _with_twin(args: tuple) -> tuple:
    """A collective's arguments, its group exchanged for one that has the same gloo for the CPU."""
    is_group = [isinstance(one, torch.ScriptObject) and one._type().name() == "ProcessGroup"
                for one in args]
    return tuple(_twin(one) if group else one for one, group in zip(args, is_group, strict=True))


def _twin(boxed: torch.ScriptObject) -> torch.ScriptObject:
    group = torch.distributed.ProcessGroup.unbox(boxed)
    backend = group._get_backend(torch.device(TYPE))  # raises for a group of the CPU
    if group.group_name not in _twins:
        twin = torch.distributed.ProcessGroup(group.rank(), group.size())
        gloo = torch.distributed.ProcessGroup.BackendType.GLOO
        twin._set_default_backend(gloo)
        twin._register_backend(torch.device("cpu"), gloo, backend)
        _twins[group.group_name] = twin
    return _twins[group.group_name].boxed()


# ---- the device as torch knows it ---------------------------------------------------------------

# `torch.tensor` asks for these where no Python sees it.


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Shadow(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    if not non_blocking:
        count_wait("copy between host and device")
    _held(target).copy_(_held(source))
    return target


def _attention(q, k, v, mask=None, dropout=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """The kernel that torch chooses on a CPU; for devices of others it knows none but the plain
    one, whose sums are others."""
    assert mask is None and not dropout and not enable_gqa
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, scale=scale
    )[0]


def _silu_backward(gradient, x):
    """Without it torch puts it together of other operators."""
    return Shadow(torch.ops.aten.silu_backward(gradient.held, x.held))


KERNELS = {
    "empty_strided": _empty_strided, "_copy_from": _copy_from, "silu_backward": _silu_backward,
}
_library = torch.library.Library("aten", "IMPL")


def register(module: ModuleType) -> None:
    """Make the device known to torch, with `module` as torch.npu, for the life of the process."""
    backend_registration._setup_privateuseone_for_python_backend(TYPE, module)
    torch.distributed.Backend.register_backend(
        BACKEND, make_backend, extended_api=True, devices=[TYPE]
    )
    for name, kernel in KERNELS.items():
        _library.impl(name, kernel, "PrivateUse1")
    _library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    torch.Tensor.pin_memory = torch.Tensor.clone  # asked for where an accelerator is
    torch.Tensor.is_pinned = lambda self, device=None: not isinstance(self, Shadow)
    torch.Tensor.record_stream = lambda self, stream: None  # its memory is the CPU's
    Everywhere().__enter__()
