"""Which samples share a row: bin packing over lengths and costs, pure and deterministic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_CANDIDATES = 128  # items looked at where a row must also keep within a cost


def pack(
    lengths: Sequence[int], capacity: int, *, costs: Sequence[int] | None = None,
    max_cost: int | None = None,
) -> list[list[int]]:
    """Put items into few bins: each takes the longest item left and the rest that fills it best.

    The rest is an exact subset sum, so samples of nearly equal length still fill a row where
    best-fit decreasing leaves the gap of one sample in every row. Of equally good rests the one of
    longer items is taken; short ones are more useful later. The bits of an integer are the sums
    that can be reached, so a bin costs one shift an item.

    Where the fullest rest would cost more than `max_cost`, the fullest of those that do not is
    taken, among the longest items that fit and a spread of the others.

    Args:
        lengths: one positive length an item, none above `capacity`.
        capacity: what a bin holds, in the same unit.
        costs: what an item costs beside its length, none above `max_cost`.
        max_cost: the cost of a bin at most; None bounds nothing.

    Returns:
        Bins of indices into `lengths`; every index is in exactly one. Indices ascend within a bin
        and bins ascend by their first index, so the order of arrival survives packing: sorting by
        length would otherwise feed training the long samples first.

    Raises:
        ValueError: a length that is not in 1..capacity, or a cost above `max_cost`.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"item {index} of length {length} does not fit a bin of {capacity}")
        if max_cost is not None and costs[index] > max_cost:
            raise ValueError(f"item {index} costs {costs[index]}, a bin at most {max_cost}")
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = []
    while left:
        first, room = left[0], capacity - lengths[left[0]]
        places = [0, *_fullest([lengths[i] for i in left[1:]], room)]
        if max_cost is not None and sum(costs[left[place]] for place in places) > max_cost:
            places = [0, *_fullest_within(
                [lengths[i] for i in left[1:]], [costs[i] for i in left[1:]], room,
                max_cost - costs[first],
            )]  # fmt: skip
        bins.append(sorted(left[place] for place in places))
        for place in reversed(places):
            del left[place]
    return sorted(bins)


def _fullest(lengths: Sequence[int], room: int) -> list[int]:
    """Places, from 1 and ascending, of the items whose sum is the largest that `room` holds."""
    within = (1 << (room + 1)) - 1
    reached = [1]  # after each item; bit s: some of the items so far sum to s
    for length in lengths:
        reached.append((reached[-1] | reached[-1] << length) & within)
        if reached[-1] >> room:
            break
    rest = reached[-1].bit_length() - 1
    places = []
    for place in range(len(reached) - 1, 0, -1):
        if not reached[place - 1] >> rest & 1:
            places.append(place)
            rest -= lengths[place - 1]
    return places[::-1]


def _fullest_within(
    lengths: Sequence[int], costs: Sequence[int], room: int, max_cost: int
) -> list[int]:
    """As `_fullest`, of those that cost at most `max_cost`.

    The least cost at which each sum can be reached, item after item: a knapsack's table, kept for
    the way back.
    """
    fitting = [i for i in range(len(lengths)) if lengths[i] <= room and costs[i] <= max_cost]
    if len(fitting) > _CANDIDATES:
        half = _CANDIDATES // 2
        others = fitting[half:]
        fitting = [*fitting[:half], *others[:: -(-len(others) // half)]]
    least = np.full(room + 1, max_cost + 1, dtype=np.int64)  # by sum of lengths
    least[0] = 0
    taken = np.zeros((len(fitting), room + 1), dtype=bool)
    for row, item in enumerate(fitting):
        length = lengths[item]
        shifted = least[:-length] + costs[item]
        taken[row, length:] = shifted < least[length:]
        least[length:] = np.minimum(least[length:], shifted)
    rest = int(np.flatnonzero(least <= max_cost)[-1])
    places = []
    for row in reversed(range(len(fitting))):
        if taken[row, rest]:
            places.append(fitting[row] + 1)
            rest -= lengths[fitting[row]]
    return places[::-1]
