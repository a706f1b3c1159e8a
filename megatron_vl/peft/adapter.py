"""A low-rank adapter of a model, as numbers: no torch, no Megatron-Core.

Of an adapted linear layer y = W x, the adapter adds s B A x, with A [r, in], B [out, r] and the
scale s = alpha / r, or alpha / sqrt(r) where it is rank-stabilised (arXiv 2106.09685, 2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_vl.typed import Number, Positive, Shape, Size, Text, typed
from megatron_vl.weights.rules import Rule

MAGNITUDE = "magnitude_vector"  # of DoRA: the length of every row of W + s B A (arXiv 2402.09353)


@dataclass(frozen=True, slots=True)
class Factors:
    """A and B of one published linear layer."""

    rank: int
    alpha: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """Which published linear layers are adapted, and how."""

    factors: Mapping[str, Factors]  # by the published name of the layer's weight
    rank_stabilized: bool = False
    dropout: float = 0.0  # share of an adapted layer's input that A does not see in training
    fused: bool = False  # the published layers of one Megatron-Core layer have one A, of one rank

    def of(self, rule: Rule) -> dict[str, Factors]:
        """Those of a Megatron-Core weight, which may be made of several published ones."""
        return {key: self.factors[key] for key in rule.published() if key in self.factors}

    def scale(self, one: Factors) -> float:
        """What B A is multiplied by."""
        return one.alpha / (math.sqrt(one.rank) if self.rank_stabilized else one.rank)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"rank_stabilized": self.rank_stabilized, "dropout": self.dropout,
                "fused": self.fused,
                "factors": {key: asdict(one) for key, one in self.factors.items()}}

    @classmethod
    def from_dict(cls, values: Any) -> Adapter:
        """The inverse of `to_dict`.

        Raises:
            ValueError: it is none.
        """
        noted = typed(_Noted, values)
        factors = {key: Factors(one.rank, one.alpha) for key, one in noted.factors.items()}
        return cls(factors=factors, rank_stabilized=noted.rank_stabilized, dropout=noted.dropout,
                   fused=noted.fused)


class _Factors(Shape):
    rank: Size
    alpha: Positive


class _Noted(Shape):
    """An adapter in a checkpoint."""

    rank_stabilized: bool
    dropout: Number
    fused: bool = False
    factors: dict[Text, _Factors]


def factor_key(key: str, factor: str) -> str:
    """The name of a factor, "A", "B" or MAGNITUDE, of the layer whose published weight is `key`."""
    leaf = "" if factor == MAGNITUDE else ".weight"
    return f"{key.removesuffix('.weight')}.lora_{factor}{leaf}"
