import random

import pytest

from megatron_vl.data.packing import pack


def _mixes():
    draw = random.Random(0)
    return {
        "equal": ([48] * 100, 512),
        "nearly equal": ([draw.randint(44, 53) for _ in range(1024)], 512),
        "long tail": (
            [min(4096, int(draw.lognormvariate(5.5, 1)) + 20) for _ in range(1024)], 4096
        ),
        "one": ([7], 7),
        "each fills a row": ([9] * 5, 9),
        "none": ([], 10),
    }


@pytest.mark.parametrize("name", _mixes())
def test_every_item_is_in_one_bin_that_holds_it(name):
    lengths, capacity = _mixes()[name]
    bins = pack(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= capacity for members in bins)


@pytest.mark.parametrize(
    ("name", "least"), [("nearly equal", 0.98), ("long tail", 0.98), ("each fills a row", 1.0)]
)
def test_rows_are_full(name, least):
    lengths, capacity = _mixes()[name]
    assert sum(lengths) >= least * capacity * len(pack(lengths, capacity))


def test_the_order_of_arrival_survives():
    bins = pack([1, 8, 2, 7, 3, 6], 10)
    assert bins == sorted(bins)
    assert all(members == sorted(members) for members in bins)


def test_an_exact_fill_is_found_where_taking_the_longest_first_misses_it():
    assert pack([5, 4, 4, 3, 2, 2], 10) == [[0, 3, 4], [1, 2, 5]]


@pytest.mark.parametrize("length", [0, -1, 11])
def test_a_length_that_fits_no_bin_is_refused(length):
    with pytest.raises(ValueError, match="item 1 of length"):
        pack([1, length], 10)
