"""What the vendor's module of this name does to torch, as far as a training here could notice it.

It acts when it is imported, which TORCH_TRANSFER_TO_NPU=1 does too, and cannot be undone:
torch.cuda answers for NPUs, "cuda" means "npu" wherever a device is named, "nccl" means "hccl".
"""

from __future__ import annotations

import functools

import torch
from torch.utils import _triton

from torch_npu import npu

_FACTORIES = ("arange", "empty", "full", "load", "ones", "rand", "randn", "tensor", "zeros")


def _device(one):
    if isinstance(one, str) and one.startswith("cuda"):
        return one.replace("cuda", "npu")
    if isinstance(one, torch.device) and one.type == "cuda":
        return torch.device("npu", one.index or 0)
    return one


def _named(change, *names):
    """A function's wrapper that changes all its arguments of these names, and positional ones."""

    def wrap(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            for name in names:
                if name in kwargs:
                    kwargs[name] = change(kwargs[name])
            return function(*map(change, args), **kwargs)

        return call

    return wrap


def _backend(one):
    return "hccl" if isinstance(one, str) and one == "nccl" else one


for _name in [one for one in vars(npu) if not one.startswith("_")]:
    setattr(torch.cuda, _name, getattr(npu, _name))
for _name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
    setattr(torch.cuda.random, _name, getattr(npu, _name))
for _owner, _names in (
    (torch, _FACTORIES), (torch.nn.Module, ("to",)),
    (torch.Tensor, ("to", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")),
):
    for _name in _names:
        setattr(_owner, _name, _named(_device, "device", "map_location")(getattr(_owner, _name)))
torch.Tensor.cuda, torch.nn.Module.cuda = torch.Tensor.npu, torch.nn.Module.npu
torch.Tensor.is_cuda = torch.Tensor.is_npu
for _name in ("init_process_group", "new_group"):
    setattr(torch.distributed, _name,
            _named(_backend, "backend")(getattr(torch.distributed, _name)))
torch.jit.script = lambda function, *args, **kwargs: function
_triton.has_triton = lambda: False
