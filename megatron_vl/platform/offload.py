"""Megatron-Core's fine-grained offloading of activations without TransformerEngine."""

from __future__ import annotations

from types import SimpleNamespace


def install_offload() -> None:
    """Let it run on any layers, and empty no tensor that something else may hold. Idempotent.

    It sets a flag of TransformerEngine's, which layers of another make do not look at. And it
    frees the storages of tensors which it has copied: of the residual, and of queries, keys and
    values. Others are views of the same storages: what norms of queries and keys keep for
    backward, features that travel with hidden states. Nothing else holds them any more a moment
    later, so they are left to go by themselves.
    """
    from megatron.core.extensions import transformer_engine
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler

    if transformer_engine.cpu_offload is None:
        transformer_engine.cpu_offload = SimpleNamespace(CPUOffloadEnabled=False)
    offload = ChunkOffloadHandler.bulk_offload
    if getattr(offload, "frees_nothing", False):
        return

    def bulk_offload(self, *args):  # the tensors to free come last
        offload(self, *args[:-1], [])

    bulk_offload.frees_nothing = True
    ChunkOffloadHandler.bulk_offload = bulk_offload
