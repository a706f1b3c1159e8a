"""What pipeline chunks hand on while an encoder spans several of them.

Megatron-Core's schedules send tensors of one shape alone. A language model's hidden states have it.
An encoder's have as many rows as there are patches, so they travel in tensors large enough for a
row that is all image.

Letters: s row length, b rows, E language width.
"""

from __future__ import annotations

import math

import torch
from megatron.core.utils import make_viewless_tensor
from torch.nn import functional as F


class Relay:
    """How this rank's chunks pack what they send.

    Args:
        config: the language model's.
        row_parts: ranks that share a row under context parallelism.
        smallest: of the smallest image, the tokens and the numbers of an encoder's states; None: no
            encoder spans chunks, and hidden states travel as they are.
    """

    def __init__(self, config, row_parts: int, smallest: tuple[int, int] | None):
        self.width, self.smallest = config.hidden_size, smallest
        tp = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.parts = tp * row_parts  # ranks that a row's hidden states are cut over

    def length(self, row_length: int) -> int:
        """The `seq_length` that the schedules need for rows of `row_length` tokens.

        Their tensors are [seq_length, b, E], or a rank's part of that under context and sequence
        parallelism. An encoder's states are whole on every TP rank, and one rank of a row may have
        all of them; a row too short for any image sends a blank one.
        """
        if self.smallest is None:
            return row_length
        tokens, numbers = self.smallest
        images = -(-row_length // tokens)
        return max(row_length, self.parts * -(-images * numbers // self.width))

    def packed(self, hidden: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Hidden states as the schedules send them, for tokens [b, s] of `shape`."""
        if self.smallest is None:
            return hidden
        b, s = shape
        room = (self.length(s) // self.parts, b, self.width)
        padded = F.pad(hidden.flatten(), (0, math.prod(room) - hidden.numel())).view(room)
        return make_viewless_tensor(padded, requires_grad=True, keep_graph=True)

    def hidden(self, received: torch.Tensor | None, row_length: int) -> torch.Tensor | None:
        """A language model's states [s, b, E] of what was received."""
        if self.smallest is None:
            return received
        return received[: row_length // self.parts]

    def states(self, received: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """An encoder's states of `shape` of what was received."""
        return received.flatten()[: math.prod(shape)].view(shape)


class EndOfGradient(torch.autograd.Function):
    """The first tensor as it is. The second gets a gradient of zero: the schedules send one back
    for whatever they received."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(received)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (received,) = ctx.saved_tensors
        return gradient, torch.zeros_like(received)
