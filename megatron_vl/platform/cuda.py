"""CUDA and ROCm devices over NCCL/RCCL: Megatron-Core's home ground."""

from __future__ import annotations

import importlib.util

import torch

from megatron_vl.errors import InputError
from megatron_vl.platform.checkpoints import install_common_reader
from megatron_vl.platform.offload import install_offload
from megatron_vl.platform.optimizer import has_fused_optimizer, install_optimizer
from megatron_vl.platform.recompute import install_recompute
from megatron_vl.platform.router import install_router
from megatron_vl.platform.weight_gradient import install_weight_gradient
from megatron_vl.platform.write_results import install_write_results


class CudaPlatform:
    name = "cuda"
    notice = ""
    collective_backend = "nccl"
    runs_cuda = True
    in_host_memory = False
    fuses_ops = importlib.util.find_spec("triton") is not None  # torch for CUDA brings it

    def install(self) -> None:
        """Megatron-Core needs help where TransformerEngine or Apex is not there alone."""
        if not has_fused_optimizer():
            install_optimizer(clips_in_step=True)
        install_weight_gradient()
        install_write_results()
        install_common_reader()
        install_recompute()
        install_router()
        install_offload()
        # Of each fused operation a model needs more kernels than torch's 8: two towers, trained and
        # evaluated. What is above the limit would run unfused, and nobody would know.
        torch._dynamo.config.recompile_limit = 64

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability()

    def cudnn_version(self) -> int:
        if torch.version.hip is not None:  # it would be MIOpen's
            return 0
        return torch.backends.cudnn.version() or 0

    def device(self, local_rank: int) -> torch.device:
        count = self.device_count()
        if local_rank >= count:
            raise InputError(
                f"process {local_rank} of this node has no GPU of its own, there are {count}; "
                f"start at most {count}, or set CUDA_VISIBLE_DEVICES= to run on the CPU."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def device_name(self) -> str:
        return torch.cuda.get_device_name()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1000
