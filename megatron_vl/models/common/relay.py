"""What pipeline chunks hand on beside, or instead of, a language model's hidden states.

Megatron-Core's schedules send tensors of one shape alone. A language model's hidden states have it.
An encoder's have as many rows as there are patches, so while one spans several chunks they travel
in tensors large enough for a row that is all image. Features that a later chunk's language layers
add travel behind the hidden states.

Letters: s row length, b rows, E language width, K features.
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
            encoder spans chunks.
        num_features: that travel from chunk to chunk at most; 0, and without `smallest`: hidden
            states travel as they are.
    """

    def __init__(
        self, config, row_parts: int, smallest: tuple[int, int] | None, num_features: int
    ):
        self.width, self.smallest = config.hidden_size, smallest
        self.num_features = num_features
        tp = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.parts = tp * row_parts  # ranks that a row's hidden states are cut over

    def length(self, row_length: int) -> int:
        """The `seq_length` that the schedules need for rows of `row_length` tokens.

        Their tensors are [seq_length, b, E], or a rank's part of that under context and sequence
        parallelism. An encoder's states are whole on every TP rank, and one rank of a row may have
        all of them; a row too short for any image sends a blank one.
        """
        length = row_length * (1 + self.num_features)
        if self.smallest is None:
            return length
        tokens, numbers = self.smallest
        images = -(-row_length // tokens)
        return max(length, self.parts * -(-images * numbers // self.width))

    def shape(self, tokens: torch.Size) -> tuple[int, int, int]:
        """What a rank is sent of tokens [b, s] of this shape."""
        b, s = tokens
        return self.length(s) // self.parts, b, self.width

    def packed(
        self, hidden: torch.Tensor, shape: torch.Size, features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states as the schedules send them, for tokens [b, s] of `shape`.

        Args:
            features: [K, s, b, E], of a language model's that are not added yet.
        """
        if self.smallest is None and not self.num_features:
            return hidden
        if features is not None:
            hidden = torch.cat([hidden, features.flatten(0, 1)])
        room = self.shape(shape)
        padded = F.pad(hidden.flatten(), (0, math.prod(room) - hidden.numel())).view(room)
        return make_viewless_tensor(padded, requires_grad=True, keep_graph=True)

    def hidden(
        self, received: torch.Tensor | None, row_length: int, num_features: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """A language model's states [s, b, E] of what was received, and features [K, s, b, E]."""
        if self.smallest is None and not self.num_features:
            return received, None
        rows = row_length // self.parts
        hidden, features = received[:rows], received[rows : rows * (1 + num_features)]
        return hidden, features.unflatten(0, (num_features, rows)) if num_features else None

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
