"""Norms that Megatron-Core's sequence parallelism can use without TransformerEngine or Apex."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.transformer import TransformerConfig

from megatron_vl.ops.fusion import choose_kernel


class LayerNorm(torch.nn.LayerNorm):
    """torch's; but on CUDA in fp32 whatever comes in, and out again in that dtype.

    CUDA's kernels add up the gradient of a 16-bit weight in 32 bits, a CPU's in 16: over 1,024
    patches it is up to a tenth off. Of other devices nothing is known.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cuda":  # `is_cuda` is also an NPU's after transfer_to_npu
            return super().forward(x)
        return torch.nn.functional.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        ).to(x.dtype)


class RMSNorm(torch.nn.RMSNorm):
    """torch's, by the kernel of `megatron_vl.ops.fusion`."""

    def __init__(self, *args, fused: bool, **options):
        super().__init__(*args, **options)
        self.normalize = choose_kernel("rms_norm", fused).function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalize(x, self.weight, self.eps)


class TorchNorm:
    """RMSNorm or LayerNorm over the last dimension, as `config.normalization` says.

    A class because Megatron-Core's specs take one; building it gives a plain torch module. Under
    sequence parallelism every rank normalises its own part of the sequence, so each holds a part of
    the weight's gradient; the mark on the parameters tells Megatron-Core to sum them.

    Raises:
        ValueError: another normalization.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        kinds = {"RMSNorm": partial(RMSNorm, fused=config.fused_ops), "LayerNorm": LayerNorm}
        if config.normalization not in kinds:
            raise ValueError(f"normalization {config.normalization!r}; use one of {list(kinds)}")
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
