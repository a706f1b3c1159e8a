"""What was measured on a card, by size, and what lies between two measured sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

Points = tuple[tuple[float, float], ...]  # (size, rate), sizes ascending


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkRates:
    """Of one link, by kind of message: (10^6 bytes one rank sends in one, 10^9 bytes a second)."""

    all_gather: Points = ()
    reduce_scatter: Points = ()
    all_reduce: Points = ()
    all_to_all: Points = ()
    send: Points = ()  # to one other rank


UNMEASURED = LinkRates()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates by size; without a point, nothing was measured and a data sheet's share counts."""

    products: Points = ()  # (10^9 FLOPs of one product, 10^12 FLOPs a second)
    attention: Points = ()  # (tokens of a segment, 10^12 FLOPs a second) of a forward pass
    attention_backward: Points = ()
    memory: Points = ()  # (10^6 bytes an operation reads and writes, 10^12 bytes a second)
    node: LinkRates = UNMEASURED  # within a node
    network: LinkRates = UNMEASURED  # between nodes


def rate_at(points: Points, size: float) -> float:
    """Between the two nearest sizes linear in the size's logarithm, beyond all that of the last."""
    if size <= points[0][0]:
        return points[0][1]
    for (below, slower), (above, faster) in pairwise(points):
        if size <= above:
            share = math.log(size / below) / math.log(above / below)
            return slower + share * (faster - slower)
    return points[-1][1]


def message_seconds(points: Points, megabytes: float) -> float:
    """Linear between the two nearest sizes, below all that of the first, beyond all by the rate of
    the last."""
    sizes = [(size, size / 1e3 / rate) for size, rate in points]
    if megabytes <= sizes[0][0]:
        return sizes[0][1]
    for (below, sooner), (above, later) in pairwise(sizes):
        if megabytes <= above:
            return sooner + (megabytes - below) / (above - below) * (later - sooner)
    return megabytes / 1e3 / points[-1][1]
