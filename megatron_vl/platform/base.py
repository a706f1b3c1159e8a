"""The protocol a machine kind fulfils, and the choice of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Platform(Protocol):
    """One kind of machine.

    Attributes:
        name: what the log calls it.
        notice: what a run says about it at its start; empty: nothing.
        collective_backend: torch.distributed backend for tensors on `device`.
        runs_cuda: whether CUDA's own libraries can run, or ROCm's in their place.
        fuses_ops: whether operations are computed by kernels other than torch's own here.
        in_host_memory: whether the device computes in the host's memory, and has no other.
    """

    name: str
    notice: str
    collective_backend: str
    runs_cuda: bool
    fuses_ops: bool
    in_host_memory: bool

    def install(self) -> None:
        """Make Megatron-Core usable here. Idempotent; must run before a model is built."""

    def device_count(self) -> int:
        """Devices of this node, of which every rank takes one; 0 where ranks share the CPU."""

    def capability(self) -> tuple[int, int] | None:
        """The device's compute capability, if `runs_cuda`; makes a CUDA context."""

    def cudnn_version(self) -> int:
        """As cuDNN counts itself, 9.6.0 is 90600; 0 without cuDNN. Makes a CUDA context."""

    def device(self, local_rank: int) -> torch.device:
        """The device of the process with this local rank, selected for it."""

    def synchronize(self) -> None:
        """Wait until everything queued on the device has run."""

    def peak_memory_bytes(self) -> int:
        """Largest memory this process held so far: device memory, or resident memory on CPU."""

    def device_name(self) -> str:
        """What its maker calls the device."""

    def mark(self) -> object:
        """Now, in the order of what is queued on the device."""

    def seconds_between(self, start: object, end: object) -> float:
        """Of the device between two marks, once both have been passed: see `synchronize`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A row of the table of platforms.

    Attributes:
        is_here: whether this machine is one; asked before anything is loaded. Raises InputError
            where it is set up as one and cannot be.
        load: makes the platform; imports what it needs.
    """

    name: str
    is_here: Callable[[], bool]
    load: Callable[[], Platform]


def _npu_is_here() -> bool:
    from megatron_vl.platform.npu import is_here

    return is_here()


def _npu() -> Platform:
    from megatron_vl.platform.npu import NpuPlatform

    return NpuPlatform()


def _cuda() -> Platform:
    from megatron_vl.platform.cuda import CudaPlatform

    return CudaPlatform()


def _cpu() -> Platform:
    from megatron_vl.platform.cpu import CpuPlatform

    return CpuPlatform()


# The first that is here is taken. NPUs are asked for before CUDA, which a user's transfer_to_npu
# makes them answer for. Of CUDA `torch.cuda.is_available()` decides and nothing else: ROCm builds
# answer it too while their `torch.version.cuda` is None.
PLATFORMS: list[Kind] = [
    Kind(name="npu", is_here=_npu_is_here, load=_npu),
    Kind(name="cuda", is_here=lambda: torch.cuda.is_available(), load=_cuda),
    Kind(name="cpu", is_here=lambda: True, load=_cpu),
]


def use_cpu() -> None:
    """Take this machine, and the processes started from here, for one without other devices."""
    os.environ.update(
        CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", ASCEND_RT_VISIBLE_DEVICES="")
    PLATFORMS[:] = [kind for kind in PLATFORMS if kind.name == "cpu"]


def select_platform() -> Platform:
    """The platform of this machine. Raises InputError: it has torch_npu, which finds no NPU."""
    return next(kind for kind in PLATFORMS if kind.is_here()).load()
