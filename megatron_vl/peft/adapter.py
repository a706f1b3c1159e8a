"""A low-rank adapter of a model, as numbers: no torch, no Megatron-Core.

Of an adapted linear layer y = W x, the adapter adds s B A x, with A [r, in], B [out, r] and the
scale s = alpha / r, or alpha / sqrt(r) where it is rank-stabilised (arXiv 2106.09685, 2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_vl.weights.rules import Rule


@dataclass(frozen=True, slots=True)
class Factors:
    """A and B of one published linear layer."""

    rank: int
    scale: float  # that B A is multiplied by


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """Which published linear layers are adapted, and how."""

    factors: Mapping[str, Factors]  # by the published name of the layer's weight
    dropout: float = 0.0  # share of an adapted layer's input that A does not see in training

    def of(self, rule: Rule) -> dict[str, Factors]:
        """Those of a Megatron-Core weight, which may be made of several published ones."""
        return {key: self.factors[key] for key in rule.published() if key in self.factors}


def scale_of(rank: int, alpha: float, *, rank_stabilized: bool) -> float:
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def factor_key(key: str, factor: str) -> str:
    """The name of a factor, "A" or "B", of the layer whose published weight is `key`."""
    return f"{key.removesuffix('.weight')}.lora_{factor}.weight"
