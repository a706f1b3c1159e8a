"""Which samples share a row: bin packing over lengths and costs, pure and deterministic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_CANDIDATES = 64  # items looked at where costs matter
_EASE = 1.1  # costs matter where they could need a tenth fewer bins than lengths, or more
_NEVER = 1 << 40  # above every cost


def pack(
    lengths: Sequence[int], capacity: int, *, costs: Sequence[int] | None = None,
    max_cost: int | None = None,
) -> list[list[int]]:
    """Put items into few bins: each takes the longest item left and the rest that fills it best.

    The rest is an exact subset sum, so samples of nearly equal length still fill a row where
    best-fit decreasing leaves the gap of one sample in every row. Of equally good rests the one of
    longer items is taken; short ones are more useful later. The bits of an integer are the sums
    that can be reached, so a bin costs one shift an item.

    Where costs matter as much as lengths, a bin that takes the cheap items leaves the dear ones
    together, and the bins to come half empty. Then the rest is one that uses length and cost in the
    proportion in which they are left, searched among the longest items and a spread of the others.

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
    length, cost = sum(lengths), 0 if max_cost is None else sum(costs)  # of the items left
    bins = []
    while left:
        room = capacity - lengths[left[0]]
        places = [0, *_fullest([lengths[i] for i in left[1:]], room)]
        if max_cost is not None:
            taken = sum(costs[left[place]] for place in places)
            after = length - sum(lengths[left[place]] for place in places)
            scarce = (cost - taken) * capacity * _EASE > after * max_cost
            if scarce or taken > max_cost:
                places = [0, *_balanced(
                    [lengths[i] for i in left[1:]], [costs[i] for i in left[1:]], room,
                    max_cost - costs[left[0]],
                    fair=cost / length * capacity - costs[left[0]],
                    worth=(length / capacity**2, cost / max(max_cost, 1) ** 2),
                )]  # fmt: skip
            cost -= sum(costs[left[place]] for place in places)
        length -= sum(lengths[left[place]] for place in places)
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


def _balanced(
    lengths: Sequence[int], costs: Sequence[int], room: int, max_cost: int, *, fair: float,
    worth: tuple[float, float],
) -> list[int]:
    """As `_fullest`, of those that cost at most `max_cost`, the one of most worth.

    A knapsack's table, kept for the way back: of all ways to reach a sum of lengths, item after
    item, the one that costs the most nearly as much of `fair` as the sum has of `room`.

    Args:
        fair: what a full rest would cost if every bin cost the same for its length.
        worth: of a unit of length, and of cost: how many bins what is left of either would fill, by
            what a bin holds.
    """
    fitting = [i for i in range(len(lengths)) if lengths[i] <= room and costs[i] <= max_cost]
    if len(fitting) > _CANDIDATES:
        half = _CANDIDATES // 2
        others = fitting[half:]
        fitting = [*fitting[:half], *others[:: -(-len(others) // half)]]
    sums = np.arange(room + 1)
    wanted = sums * (max(0, min(fair, max_cost)) / max(room, 1))
    spent = np.full(room + 1, _NEVER, dtype=np.int64)  # by sum of lengths
    spent[0] = 0
    off = np.abs(spent - wanted)
    taken = np.zeros((len(fitting), room + 1), dtype=bool)
    for row, item in enumerate(fitting):
        length = lengths[item]
        with_it = spent[:-length] + costs[item]
        off_with_it = np.where(with_it <= max_cost, np.abs(with_it - wanted[length:]), _NEVER)
        better = np.less(off_with_it, off[length:], out=taken[row, length:])
        np.copyto(spent[length:], with_it, where=better)
        np.copyto(off[length:], off_with_it, where=better)
    gain = sums * worth[0] + spent * worth[1]
    rest = int(np.argmax(np.where(spent <= max_cost, gain, -1.0)))
    places = []
    for row in reversed(range(len(fitting))):
        if taken[row, rest]:
            places.append(fitting[row] + 1)
            rest -= lengths[fitting[row]]
    return places[::-1]
