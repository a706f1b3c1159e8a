"""Megatron-Core on CPU over gloo.

The optimizer is that of a GPU without TransformerEngine: see `platform.optimizer`.
"""

from __future__ import annotations

import platform
import resource
import sys
import time

import torch

from megatron_vl.platform.checkpoints import install_common_reader
from megatron_vl.platform.offload import install_offload
from megatron_vl.platform.optimizer import install_optimizer
from megatron_vl.platform.recompute import install_recompute
from megatron_vl.platform.router import install_router
from megatron_vl.platform.stand_in import install_stand_in
from megatron_vl.platform.uneven import install_uneven
from megatron_vl.platform.write_results import install_write_results

_installed = False


class CpuPlatform:
    name = "cpu"
    notice = ""
    collective_backend = "gloo"
    runs_cuda = False
    fuses_ops = False  # every process would start a C++ compiler
    in_host_memory = True

    def install(self) -> None:
        global _installed
        if _installed:
            return
        install_stand_in(self.device(0))
        install_optimizer()
        install_write_results()
        install_common_reader()
        install_recompute()
        install_router()
        install_offload()
        install_uneven()
        _installed = True

    def device_count(self) -> int:
        return 0

    def capability(self) -> None:
        """It has none."""

    def cudnn_version(self) -> int:
        return 0

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
