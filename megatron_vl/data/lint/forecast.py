"""How rows would come out: the same packing as in training, over samples drawn as training does."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from megatron_vl.data.encode.packing import pack
from megatron_vl.data.lint.look import Look
from megatron_vl.data.lint.reading import Leaf

BUFFER = 1024  # samples rows are packed from, as in training
_BUFFERS = 2  # packed where there are so many: with few kinds of samples, no two fill alike
_STEP = 128  # a row's length is a multiple of it: it has to be shared out over TP and CP


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Rows of one length. What is None could not be told: no sample fits."""

    seq_length: int  # tokens of a row
    max_patches: int | None  # of a row; None: any number
    lost: float  # share of the samples that no row holds
    rows: int | None = None  # an epoch
    samples: float | None = None  # a row
    fill: float | None = None  # share of the rows' tokens that are samples'
    alone: float | None = None  # the same if no two samples shared a row
    patches_mean: float | None = None  # a row
    patches_max: int | None = None

    @property
    def unevenness(self) -> float | None:
        """The vision tower's work at the fullest row to that at the average one."""
        return self.patches_max / self.patches_mean if self.patches_mean else None


def lengths_around(seq_length: int) -> list[int]:
    """`seq_length`, and the two powers of two on either side of it."""
    above = 1 << seq_length.bit_length()
    below = 1 << ((seq_length - 1).bit_length() - 1) if seq_length > 1 else 1
    return sorted({max(1, below // 2), below, seq_length, above, 2 * above})


def least_length(looks: Sequence[Look]) -> int | None:
    """The least row length that loses none of them."""
    longest = max((look.tokens for look in looks if look.tokens), default=None)
    return None if longest is None else -(-longest // _STEP) * _STEP


class Forecaster:
    """Forecasts for the samples that were looked at."""

    def __init__(self, leaves: Sequence[Leaf], looks: Sequence[Look], *, endless: bool, seed: int):
        """`endless`: as in training, what fills a row least goes back into the next buffer."""
        self.leaves, self.seed = leaves, seed
        self.epoch = sum(leaf.epoch for leaf in leaves)
        endless = self.endless = endless and self.epoch > BUFFER  # an epoch ends in its last buffer
        self.buffer = BUFFER if endless else max(1, min(BUFFER, int(self.epoch)))
        self.buffers = _BUFFERS if endless or self.epoch >= _BUFFERS * BUFFER else 1
        self.seen = [[look for look in looks if look.leaf == i] for i in range(len(leaves))]

    def rows(self, seq_length: int, max_patches: int | None = None) -> Forecast:
        kept, usable = self._kept(seq_length, max_patches)
        what = {"seq_length": seq_length, "max_patches": max_patches}
        lost = 1 - self._share(kept, usable)
        if not any(kept):
            return Forecast(**what, lost=lost)
        rows = self._pack(self._draws(kept), seq_length, max_patches)
        tokens, patches = (
            [sum(getattr(look, name) for look in row) for row in rows]
            for name in ("tokens", "patches")
        )
        samples = sum(map(len, rows))
        return Forecast(
            **what, lost=lost, samples=samples / len(rows),
            rows=max(1, round(self.epoch * self._share(kept, self.seen) * len(rows) / samples)),
            fill=sum(tokens) / (len(rows) * seq_length), alone=sum(tokens) / (samples * seq_length),
            patches_mean=sum(patches) / len(rows), patches_max=max(patches),
        )  # fmt: skip

    def packed(self, seq_length: int, max_patches: int | None = None) -> list[list[Look]]:
        """The rows that `rows` counts; none if no sample fits one."""
        kept, _ = self._kept(seq_length, max_patches)
        return self._pack(self._draws(kept), seq_length, max_patches) if any(kept) else []

    def _kept(
        self, seq_length: int, max_patches: int | None
    ) -> tuple[list[list[Look]], list[list[Look]]]:
        """Of every dataset the samples that a row holds, and those that some length could."""

        def fits(look: Look) -> bool:
            return look.tokens <= seq_length and (
                max_patches is None or look.patches <= max_patches
            )

        # A reason that has nothing to do with the length keeps a sample out of every row.
        usable = [[look for look in seen if look.tokens is not None] for seen in self.seen]
        return [[look for look in looks if fits(look)] for looks in usable], usable

    def _pack(
        self, draws: Iterator[Look], seq_length: int, max_patches: int | None
    ) -> list[list[Look]]:
        """The rows of the first buffers; in training the emptiest goes back into the next one."""
        rows, back = [], []
        for _ in range(self.buffers):
            window = [*back, *islice(draws, self.buffer - len(back))]
            bins = pack(
                [look.tokens for look in window], seq_length,
                costs=[look.patches for look in window], max_cost=max_patches,
            )  # fmt: skip
            found = [[window[i] for i in members] for members in bins]
            back = []
            if self.endless and len(found) > 1:
                back = min(found, key=lambda row: sum(look.tokens for look in row))
            rows += [row for row in found if row is not back]
        return rows

    def _share(self, part: Sequence[Sequence], whole: Sequence[Sequence]) -> float:
        """`part` of `whole`, each dataset by its share."""
        of = [(leaf.share, len(a) / len(b)) for leaf, a, b in zip(
            self.leaves, part, whole, strict=True) if b]
        total = sum(share for share, _ in of)
        return sum(share * ratio for share, ratio in of) / total if total else 0.0

    def _draws(self, groups: Sequence[Sequence[Look]]) -> Iterator[Look]:
        """Endless: every dataset by its share, all of its samples before one comes again."""
        draw = random.Random(self.seed)
        decks: list[list[Look]] = [[] for _ in groups]
        owed = [0.0] * len(groups)
        among = [i for i, group in enumerate(groups) if group]
        while True:
            for i in among:
                owed[i] += self.leaves[i].share
            chosen = max(among, key=owed.__getitem__)
            owed[chosen] -= sum(self.leaves[i].share for i in among)
            if not decks[chosen]:
                decks[chosen] = draw.sample(groups[chosen], len(groups[chosen]))
            yield decks[chosen].pop()
