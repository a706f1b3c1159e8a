"""Which samples share a row: bin packing over lengths, pure and deterministic."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into few bins: each takes the longest item left and the rest that fills it best.

    The rest is an exact subset sum, so samples of nearly equal length still fill a row where
    best-fit decreasing leaves the gap of one sample in every row. Of equally good rests the one of
    longer items is taken; short ones are more useful later. The bits of an integer are the sums
    that can be reached, so a bin costs one shift an item.

    Args:
        lengths: one positive length an item, none above `capacity`.
        capacity: what a bin holds, in the same unit.

    Returns:
        Bins of indices into `lengths`; every index is in exactly one. Indices ascend within a bin
        and bins ascend by their first index, so the order of arrival survives packing: sorting by
        length would otherwise feed training the long samples first.

    Raises:
        ValueError: a length that is not in 1..capacity.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"item {index} of length {length} does not fit a bin of {capacity}")
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = []
    while left:
        places = [0, *_fullest([lengths[i] for i in left[1:]], capacity - lengths[left[0]])]
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
