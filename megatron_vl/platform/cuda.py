"""CUDA and ROCm devices over NCCL/RCCL: Megatron-Core's home ground, nothing to install."""

from __future__ import annotations

import torch


class CudaPlatform:
    name = "cuda"
    collective_backend = "nccl"

    def install(self) -> None:
        """Megatron-Core needs no help on a CUDA device."""

    def device(self, local_rank: int) -> torch.device:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()
