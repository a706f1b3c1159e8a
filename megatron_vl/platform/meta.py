"""One rank of any layout alone in a process: torch's meta device, and groups that send nothing.

Tensors of the meta device have shapes and storages of their size, and no memory behind them. What
the host computes with, lengths, grids and places, stays real, as beside any other device; what is
to come back from the device cannot, and says so.
"""

from __future__ import annotations

import os

import torch

from megatron_vl.platform.balanced import install_balanced
from megatron_vl.platform.base import PLATFORMS, Kind, use_cpu
from megatron_vl.platform.cpu import CpuPlatform
from megatron_vl.platform.init import leave_layout
from megatron_vl.platform.optimizer import install_optimizer
from megatron_vl.platform.recompute import install_recompute
from megatron_vl.platform.router import install_router
from megatron_vl.platform.stand_in import install_stand_in

BACKEND = "fake"
_installed: list = []  # torch.library's registrations, which end with their objects


class MetaPlatform(CpuPlatform):
    """Computes shapes alone, in the operations of a CPU."""

    name = "meta"
    collective_backend = BACKEND
    in_host_memory = False

    def install(self) -> None:
        if _installed:
            return
        import torch.testing._internal.distributed.fake_pg  # registers "fake"

        install_stand_in(self.device(0))
        install_optimizer()
        install_recompute()
        install_router()
        _installed.extend((_attention_of_the_cpu(), _several_at_once(), install_balanced()))
        new_group = torch.distributed.new_group
        torch.distributed.new_group = lambda *args, **kwargs: new_group(
            *args, **{**kwargs, "backend": BACKEND})
        # Several at once would be asked for a backend of the device.
        torch.distributed.batch_isend_irecv = lambda transfers: [
            one.op(one.tensor, one.peer, one.group) for one in transfers]

    def device(self, local_rank: int) -> torch.device:
        return torch.device("meta")


def _attention_of_the_cpu() -> torch.library.Library:
    """Of meta tensors torch would take the variant that keeps every weight of a token."""

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *,
                  scale=None, enable_gqa=False):
        out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        return out

    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", attention, "AutogradMeta")
    return library


def _several_at_once() -> torch.library.Library:
    """torch's own collectives that know meta tensors are those of one tensor."""
    from torch._C._distributed_c10d import FakeWork

    library = torch.library.Library("c10d", "IMPL")
    for name in ("allgather_into_tensor_coalesced_", "allreduce_coalesced_",
                 "reduce_scatter_tensor_coalesced_"):
        library.impl(name, lambda *args: FakeWork().boxed(), "Meta")
    return library


def become(rank: int, world_size: int) -> None:
    """Make this process, which has no other platform, that rank of so many for `initialize`.

    It may have been another one before.
    """
    if torch.distributed.is_initialized():
        leave_layout()
        torch.distributed.destroy_process_group()
    use_cpu()  # nothing may stand in for a CUDA device that is there
    PLATFORMS[:] = [Kind(name="meta", is_here=lambda: True, load=MetaPlatform)]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    os.environ.pop("MASTER_ADDR", None)
