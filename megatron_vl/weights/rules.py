"""How one Megatron-Core tensor is made of published tensors, said once for both directions.

A rule lists, in order, the row blocks a Megatron-Core tensor is made of, and the dimension tensor
parallelism cuts. From that one list follow the slices of any TP rank (`pieces`), read one way to
write Megatron-Core's tensors and the other way to write the published ones.

Letters: N query heads, G query groups (key/value heads), D head width, F ffn width, V vocabulary.

    q_proj [N*D, ...]   rows of group g: q heads g*N/G .. (g+1)*N/G, then k head g, then v head g
    k_proj [G*D, ...]   -> linear_qkv [(N + 2*G)*D, ...], cut evenly over TP ranks
    v_proj [G*D, ...]

With more TP ranks than groups the even cut goes through a group; Megatron-Core 0.16 gathers the
activations of such a layer and picks its heads (`SelfAttention.get_query_key_value_tensors`), so
its weights are cut evenly all the same and nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megatron_vl.errors import InputError


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [start, stop) of published tensor `key`; rows of zeros where key is None."""

    key: str | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Piece:
    """`stored[at : at + shape]` is `published[key][start : start + shape]`; zeros if key is None.

    All three tuples have one number a dimension of the tensor. A matrix may be stored `turned`:
    `stored[at : at + reversed(shape)]` is then the transpose of that box.
    """

    key: str | None
    start: tuple[int, ...]
    at: tuple[int, ...]
    shape: tuple[int, ...]
    turned: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Base of the rules. A subclass says `rows`, `published` and, if it is not 0, `axis`."""

    def rows(self, tp: int) -> list[Rows]:
        """Row blocks of all TP ranks, rank after rank, before `axis` cuts them."""
        raise NotImplementedError

    def published(self) -> dict[str, tuple[int, ...]]:
        """Shape of every published tensor the rule reads and writes."""
        raise NotImplementedError

    @property
    def axis(self) -> int | None:
        """Dimension tensor parallelism cuts; None keeps the whole tensor on every rank."""
        return 0

    @property
    def tail(self) -> tuple[int, ...]:
        """Extents after the first dimension, alike for all published tensors of the rule."""
        return next(iter(self.published().values()))[1:]

    def as_stored(self, shape: Sequence[int], tp: int) -> Rule:
        """The rule of a checkpoint that another tool may have padded otherwise, or not at all.

        Args:
            shape: of the tensor on each of `tp` ranks. Where it fits no such rule, neither will the
                shape that `pieces` answers.
        """
        return self

    def numbered(self, **numbers: int) -> Rule:
        """The same rule with `{i}` in its keys replaced by the number `i`, and so on."""
        named = {}
        for field in fields(self):
            key = getattr(self, field.name)
            if isinstance(key, str):
                for mark, number in numbers.items():
                    key = key.replace(f"{{{mark}}}", str(number))
                named[field.name] = key
        return replace(self, **named)

    def pieces(self, tp: int, rank: int) -> tuple[tuple[int, ...], tuple[Piece, ...]]:
        """(shape, pieces) of what TP rank `rank` of `tp` stores.

        Raises:
            InputError: `tp` does not divide the cut dimension.
        """
        rows = self.rows(tp)
        height, tail = sum(row.stop - row.start for row in rows), self.tail
        low, high, column, width = 0, height, 0, tail
        if self.axis == 0:
            part = self._part(height, tp)
            low, high = rank * part, (rank + 1) * part
        elif self.axis == 1:
            part = self._part(tail[0], tp)
            column, width = rank * part, (part, *tail[1:])
        found, at = [], 0
        for row in rows:
            size = row.stop - row.start
            start, stop = max(at, low), min(at + size, high)
            if start < stop:
                rest = (0,) * (len(width) - 1) if width else ()
                found.append(Piece(
                    key=row.key,
                    start=(row.start + start - at, *((column, *rest) if width else ())),
                    at=(start - low, *((0,) * len(width))),
                    shape=(stop - start, *width),
                ))
            at += size
        return (high - low, *width), tuple(found)

    def _part(self, size: int, tp: int) -> int:
        if size % tp:
            raise InputError(
                f"TP {tp} does not divide the {size} of {', '.join(self.published())}; use a TP "
                f"that does."
            )
        return size // tp


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy(Rule):
    """The same tensor on every TP rank."""

    key: str
    shape: tuple[int, ...]

    def rows(self, tp: int) -> list[Rows]:
        return [Rows(self.key, 0, self.shape[0])]

    def published(self) -> dict[str, tuple[int, ...]]:
        return {self.key: self.shape}

    @property
    def axis(self) -> None:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnParallel(Copy):
    """Cut on dimension 0: a column-parallel linear layer's weight or bias."""

    @property
    def axis(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RowParallel(Copy):
    """Cut on dimension 1: a row-parallel linear layer's weight.

    `padded` is the number of columns stored by all ranks together, with zeros behind the published
    ones; None: as many as were published.
    """

    padded: int | None = None

    def as_stored(self, shape: Sequence[int], tp: int) -> Rule:
        bare = shape[1:] == (self.shape[1] // tp,)
        return replace(self, padded=None) if bare else self

    def pieces(self, tp: int, rank: int) -> tuple[tuple[int, ...], tuple[Piece, ...]]:
        if self.padded is None:
            return Copy.pieces(self, tp, rank)
        height, columns = self.shape
        part = self._part(self.padded, tp)
        held = range(columns)[rank * part : (rank + 1) * part]
        found = []
        if held:
            found.append(Piece(key=self.key, start=(0, held.start), at=(0, 0),
                               shape=(height, len(held))))
        if len(held) < part:
            found.append(Piece(key=None, start=(0, 0), at=(0, len(held)),
                               shape=(height, part - len(held))))
        return (height, part), tuple(found)

    @property
    def axis(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True, slots=True)
class QKV(Rule):
    """q, k and v interleaved by query group: [q.. k v] for each group."""

    q: str
    k: str
    v: str
    heads: int
    groups: int
    head_dim: int
    columns: int | None  # None for a bias

    def rows(self, tp: int) -> list[Rows]:
        per_group, width = self.heads // self.groups * self.head_dim, self.head_dim
        return [
            Rows(key, group * size, (group + 1) * size)
            for group in range(self.groups)
            for key, size in ((self.q, per_group), (self.k, width), (self.v, width))
        ]

    def published(self) -> dict[str, tuple[int, ...]]:
        tail = () if self.columns is None else (self.columns,)
        query, group = self.heads * self.head_dim, self.groups * self.head_dim
        return {self.q: (query, *tail), self.k: (group, *tail), self.v: (group, *tail)}


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedQKV(Rule):
    """One published tensor of three blocks [q; k; v] -> [q k v] for each head."""

    key: str
    heads: int
    head_dim: int
    columns: int | None  # None for a bias

    def rows(self, tp: int) -> list[Rows]:
        block, width = self.heads * self.head_dim, self.head_dim
        return [
            Rows(self.key, part * block + head * width, part * block + (head + 1) * width)
            for head in range(self.heads)
            for part in range(3)
        ]

    def published(self) -> dict[str, tuple[int, ...]]:
        tail = () if self.columns is None else (self.columns,)
        return {self.key: (3 * self.heads * self.head_dim, *tail)}


@dataclass(frozen=True, kw_only=True, slots=True)
class GateUp(Rule):
    """linear_fc1 = [gate; up], each TP rank with its own part of both.

    `padded` is the number of rows that all ranks together store of each, with zeros behind the
    published ones; None: as many as were published.
    """

    gate: str
    up: str
    ffn: int
    columns: int | None  # None for a bias
    padded: int | None = None

    def as_stored(self, shape: Sequence[int], tp: int) -> Rule:
        bare = shape[:1] == (2 * self.ffn // tp,)
        return replace(self, padded=None) if bare else self

    def rows(self, tp: int) -> list[Rows]:
        part = self._part(self.padded or self.ffn, tp)
        found = []
        for rank in range(tp):
            held = range(self.ffn)[rank * part : (rank + 1) * part]
            for key in (self.gate, self.up):
                found += [Rows(key, held.start, held.stop)] if held else []
                found += [Rows(None, 0, part - len(held))] if len(held) < part else []
        return found

    def published(self) -> dict[str, tuple[int, ...]]:
        tail = () if self.columns is None else (self.columns,)
        return dict.fromkeys((self.gate, self.up), (self.ffn, *tail))


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocab(Rule):
    """An embedding or output layer: cut on the vocabulary, padded with zeros to a multiple of TP.

    `padded` is the number of rows stored by all ranks together; None pads as little as TP needs.
    """

    key: str
    vocab: int
    columns: int
    padded: int | None = None

    def as_stored(self, shape: Sequence[int], tp: int) -> Rule:
        return replace(self, padded=shape[0] * tp) if shape else self

    def rows(self, tp: int) -> list[Rows]:
        stored = self.padded or -(-self.vocab // tp) * tp
        if stored < self.vocab:
            raise InputError(
                f"{self.key} is stored with {stored} rows but config.json's vocab_size is "
                f"{self.vocab}; use the config.json the checkpoint was made from."
            )
        padding = [Rows(None, 0, stored - self.vocab)] if stored > self.vocab else []
        return [Rows(self.key, 0, self.vocab), *padding]

    def published(self) -> dict[str, tuple[int, ...]]:
        return {self.key: (self.vocab, self.columns)}


def box(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """The slices of the box of extents `shape` at `start`."""
    return tuple(slice(low, low + size) for low, size in zip(start, shape, strict=True))
