"""The platform of the device, through the door that another maker's takes: a row of PLATFORMS."""

from __future__ import annotations

import torch

from megatron_vl.platform.base import PLATFORMS, Kind
from megatron_vl.platform.cpu import CpuPlatform
from megatron_vl.platform.offload import install_offload
from megatron_vl.platform.optimizer import install_optimizer
from megatron_vl.platform.recompute import install_recompute
from megatron_vl.platform.router import install_router
from megatron_vl.platform.stand_in import install_stand_in
from megatron_vl.platform.write_results import install_write_results
from shadow import device

_installed = False


class ShadowPlatform(CpuPlatform):
    """Memory and time are the CPU's."""

    name = "shadow"
    in_host_memory = False
    collective_backend = device.TYPE

    def install(self) -> None:
        global _installed
        if _installed:
            return
        device.register()
        install_stand_in(self.device(0))
        torch.cuda.synchronize = torch.shadow.synchronize
        install_optimizer()
        install_write_results()
        install_recompute()
        install_router()
        install_offload()
        _installed = True

    def device(self, local_rank: int) -> torch.device:
        return torch.device(device.TYPE, 0)

    def synchronize(self) -> None:
        torch.shadow.synchronize()


def use_it() -> None:
    """Take it for the machine's, in this process."""
    PLATFORMS.insert(0, Kind(name="shadow", is_here=lambda: True, load=ShadowPlatform))
