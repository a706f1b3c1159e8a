"""Megatron-Core's linear layers with a frozen weight in blocks: see `megatron_vl.ops.quantized`.

Nothing of them changes but what their weight is: communication, sequence parallelism and hooks are
Megatron-Core's. Where a weight is frozen, it multiplies by it in a function of autograd that saves
the weight for the gradient of the input, and this weight is saved as its codes.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_vl.ops.quantized import QuantizedTensor


class QuantizedColumnLinear(ColumnParallelLinear):
    """Its configuration's `quantize_base` is the form of the weight."""

    def __init__(self, *args, config, **kwargs):
        super().__init__(*args, config=config, **kwargs)
        self.weight = _room(self.weight, config.quantize_base)


class QuantizedRowLinear(RowParallelLinear):
    """The same, cut in its input."""

    def __init__(self, *args, config, **kwargs):
        super().__init__(*args, config=config, **kwargs)
        self.weight = _room(self.weight, config.quantize_base)


def _room(weight: torch.nn.Parameter, form: str) -> torch.nn.Parameter:
    """In place of a weight that is freed with this layer's construction: one layer's at a time."""
    return torch.nn.Parameter(QuantizedTensor.empty_like(weight, form), requires_grad=False)
