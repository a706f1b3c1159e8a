import math
import random

import pytest

from megatron_vl.data.encode.packing import pack


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


def _images_and_text(items=512, capacity=8192, seed=0):
    """Lengths, and patches as costs: a token of an image is four patches, and there is text."""
    draw = random.Random(seed)
    lengths, patches = [], []
    for _ in range(items):
        seen = int(draw.lognormvariate(5.5, 1)) if draw.random() < 0.8 else 0
        said = int(draw.lognormvariate(4.5, 0.8)) + 20
        lengths.append(min(capacity, said + seen))
        patches.append(4 * min(seen, 4000))
    return lengths, patches, capacity


# Of the cost that bins full of the average item would have; at 1.0 bins can just be full of both.
BUDGETS = [2.0, 1.2, 1.0, 0.9, 0.75]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("mix", ["patches", "any cost"])
def test_rows_within_a_cost_are_as_full_as_it_allows(mix, budget):
    lengths, costs, capacity = _images_and_text()
    if mix == "any cost":
        draw = random.Random(1)
        costs = [draw.randint(0, 4000) for _ in lengths]
    max_cost = int(budget * sum(costs) / sum(lengths) * capacity)
    bins = pack(lengths, capacity, costs=costs, max_cost=max_cost)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= capacity for members in bins)
    assert all(sum(costs[index] for index in members) <= max_cost for members in bins)
    needed = math.ceil(max(sum(lengths) / capacity, sum(costs) / max_cost))
    assert needed >= 0.97 * len(bins)
    assert bins == sorted(bins)


def test_packing_the_same_again_gives_the_same():
    lengths, costs, capacity = _images_and_text(200)
    first, again = (pack(lengths, capacity, costs=costs, max_cost=20000) for _ in range(2))
    assert first == again


def test_a_cost_that_no_row_reaches_changes_nothing():
    lengths, costs, capacity = _images_and_text()
    assert pack(lengths, capacity, costs=costs, max_cost=10**9) == pack(lengths, capacity)
    assert pack([5, 4, 3], 10, costs=[0, 0, 0], max_cost=0) == pack([5, 4, 3], 10)


def test_the_dear_are_spread_over_the_rows():
    assert pack([2] * 8, 8, costs=[3, 3, 0, 0, 0, 0, 3, 3], max_cost=6) == [
        [0, 1, 2, 3], [4, 5, 6, 7]
    ]  # fmt: skip


def test_an_item_that_no_bin_may_cost_is_refused():
    with pytest.raises(ValueError, match="item 1 costs 7, a bin at most 6"):
        pack([1, 1], 10, costs=[6, 7], max_cost=6)


@pytest.mark.parametrize("length", [0, -1, 11])
def test_a_length_that_fits_no_bin_is_refused(length):
    with pytest.raises(ValueError, match="item 1 of length"):
        pack([1, length], 10)
