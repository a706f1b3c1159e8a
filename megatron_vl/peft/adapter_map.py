"""Which part of an adapter's published factors lies where, in any layout.

It follows from the rules of the weights that are adapted. Letters: k published layers that a
Megatron-Core layer is made of and that are adapted, r the largest rank of theirs. In a fused
adapter k is 1, and A that of each of the layers.

    column-parallel W [out/tp, in]   A [k r, in] on every rank      B [out/tp, r]
    row-parallel    W [out, in/tp]   A [r, in/tp]                   B [out, r] on every rank

The rows of B lie as those of W do: q, k and v interleaved, gate above up, cut over TP alike. Where
a layer is not adapted, or its rank is below r, rows and columns are zero; they stay so in training,
since the gradient of each is a product with a zero of the other factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_vl.errors import InputError
from megatron_vl.models.common.parts import part_of
from megatron_vl.parallel import StageSplit
from megatron_vl.peft.adapter import Adapter, factor_key
from megatron_vl.weights.map import Stored, Weight, WeightMap, listed, volume
from megatron_vl.weights.rules import Piece, Rule

Shape = tuple[int, ...]
FACTOR_NAMES = r".*\.lora\.[ab]"  # a pattern of them
FACTORS = {"A": "lora.a", "B": "lora.b"}  # and the leaf of its Megatron-Core name


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedWeight:
    """One Megatron-Core weight that is adapted."""

    weight: Weight
    rule: Rule  # of its layer
    layer: int  # of the model
    local: int  # of the chunk
    adapter: Adapter

    def module(self, *, local: bool) -> str:
        """Name of the linear layer, its number counted in the chunk or in the model."""
        number = self.local if local else self.layer
        return self.weight.named(number, 0).removesuffix(".weight")

    def published(self) -> dict[str, Shape]:
        """Shape of every published factor of it."""
        shapes = {}
        for key, factors in self.adapter.of(self.rule).items():
            rows, columns = self.rule.published()[key]
            shapes[factor_key(key, "A")] = factors.rank, columns
            shapes[factor_key(key, "B")] = rows, factors.rank
        return shapes

    @property
    def numbers(self) -> int:
        """Of its factors: those that are trained."""
        shapes = self.published()
        if self.adapter.fused:
            for key in list(self.adapter.of(self.rule))[1:]:
                del shapes[factor_key(key, "A")]
        return sum(map(volume, shapes.values()))

    @property
    def blocks_of_a(self) -> int:
        """k."""
        return 1 if self.adapter.fused else len(self.adapter.of(self.rule))

    def stored(self, factor: str, *, tp: int, rank: int, local: bool) -> Stored:
        """What TP rank `rank` of `tp` holds of a factor."""
        shape, pieces = factor_pieces(self.rule, self.adapter, factor, tp, rank)
        return Stored(file="", part="", name=f"{self.module(local=local)}.{FACTORS[factor]}",
                      shape=shape, pieces=pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterMap:
    """An adapter of the model that `weights` describes."""

    weights: WeightMap
    adapter: Adapter

    def chunk(self, split: StageSplit, stage: int, chunk: int) -> Iterator[AdaptedWeight]:
        """The adapted weights of one model chunk."""
        for weight, layer, local in self.weights.chunk_weights(split, stage, chunk):
            rule = weight.rule_of(layer, 0)
            if weight.experts is None and self.adapter.of(rule):
                yield AdaptedWeight(weight=weight, rule=rule, layer=layer, local=local,
                                    adapter=self.adapter)

    @property
    def parts(self) -> tuple[str, ...]:
        """Keys of PARTS that the adapter has factors in."""
        return tuple(dict.fromkeys(part_of(one.weight.name) for one in self.whole()))

    def whole(self) -> Iterator[AdaptedWeight]:
        """The adapted weights of the model."""
        return self.chunk(StageSplit.create(layers=self.weights.layers), 0, 0)

    def global_inventory(self, found: Mapping[str, Shape]) -> list[Stored]:
        """What a torch_dist checkpoint holds of the factors; `found` has every tensor's shape.

        Raises:
            InputError: some are missing.
        """
        inventory = [one.stored(factor, tp=1, rank=0, local=False)
                     for one in self.whole() for factor in FACTORS]
        if missing := [one.name for one in inventory if one.name not in found]:
            raise InputError(
                f"the checkpoint lacks {len(missing)} factor(s) of its adapter: {listed(missing)}; "
                f"copy it again."
            )
        return inventory

    def published(self) -> dict[str, Shape]:
        """Shape of every published factor, in the order of the model."""
        return {key: shape for one in self.whole() for key, shape in one.published().items()}


def factor_pieces(
    rule: Rule, adapter: Adapter, factor: str, tp: int, rank: int
) -> tuple[Shape, tuple[Piece, ...]]:
    """(shape, pieces) of what TP rank `rank` of `tp` holds of factor "A" or "B"."""
    shape, pieces = rule.pieces(tp, rank)
    factors = adapter.of(rule)
    widest = max(one.rank for one in factors.values())
    if rule.axis == 1:
        ((key, one),) = factors.items()  # a row-parallel weight is one published tensor
        if factor == "A":
            return (widest, shape[1]), tuple(
                Piece(key and factor_key(key, "A"), (0, piece.start[1]), (0, piece.at[1]),
                      (widest, piece.shape[1]))
                for piece in pieces for key in (piece.key,)
            )
        return (shape[0], widest), (
            Piece(factor_key(key, "B"), (0, 0), (0, 0), (shape[0], one.rank)),
        )
    if factor == "A":
        found = []
        for number, (key, one) in enumerate(factors.items()):
            row = 0 if adapter.fused else number * widest
            found += _padded(factor_key(key, "A"), (0, 0), (row, 0), (one.rank, shape[1]),
                             (widest, shape[1]))
        return ((1 if adapter.fused else len(factors)) * widest, shape[1]), tuple(found)
    found = []
    for piece in pieces:
        rows, at = piece.shape[0], (piece.at[0], 0)
        if piece.key in factors:
            found += _padded(factor_key(piece.key, "B"), (piece.start[0], 0), at,
                             (rows, factors[piece.key].rank), (rows, widest))
        else:
            found.append(Piece(None, (0, 0), at, (rows, widest)))
    return (shape[0], widest), tuple(found)


def _padded(key: str, start: Shape, at: Shape, shape: Shape, full: Shape) -> list[Piece]:
    """A piece, and one of zeros behind it where `full` is larger in one dimension."""
    found = [Piece(key, start, at, shape)]
    for axis in range(2):
        if more := full[axis] - shape[axis]:
            behind = tuple(a + (shape[axis] if one == axis else 0) for one, a in enumerate(at))
            extents = tuple(more if one == axis else size for one, size in enumerate(shape))
            found.append(Piece(None, (0, 0), behind, extents))
    return found


def blocks(rule: Rule, adapter: Adapter, tp: int, rank: int) -> list[tuple[int, int, int]]:
    """(first row, rows, number of the adapted layer) of the rows of W, and so of B, on a rank."""
    _, pieces = rule.pieces(tp, rank)
    numbers = {key: number for number, key in enumerate(adapter.of(rule))}
    return [(piece.at[0], piece.shape[0], numbers[piece.key])
            for piece in pieces if piece.key in numbers]
