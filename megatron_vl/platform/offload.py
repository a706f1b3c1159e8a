"""Megatron-Core's fine-grained offloading of activations, for layers of any make."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from megatron_vl.platform.init import current_device


def install_offload() -> None:
    """Let it run without TransformerEngine, and free no storage by force. Idempotent.

    Megatron-Core sets a flag of TransformerEngine's, which no other layer looks at. It then frees
    the storages of the residual and of queries, keys and values, although other tensors may be
    views of the same: what norms of queries and keys keep for backward, features that travel with
    hidden states. Without force they are free as soon as nothing holds them.
    """
    from megatron.core.extensions import transformer_engine
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offloading

    if transformer_engine.cpu_offload is None:
        transformer_engine.cpu_offload = SimpleNamespace(CPUOffloadEnabled=False)
    handler = offloading.ChunkOffloadHandler
    offload = handler.bulk_offload
    if getattr(offload, "frees_nothing", False):
        return

    def bulk_offload(self, *args):  # the tensors to free come last
        offload(self, *args[:-1], [])

    bulk_offload.frees_nothing = True
    handler.bulk_offload = bulk_offload
    if hasattr(handler, "_can_manage_tensor_for_offload"):  # of 0.19, which takes CUDA's alone
        handler._can_manage_tensor_for_offload = staticmethod(_is_an_activation)


def _is_an_activation(tensor: torch.Tensor) -> bool:
    return tensor.device.type == current_device().type and not isinstance(
        tensor, (torch.nn.Parameter, FakeTensor, FunctionalTensor))
