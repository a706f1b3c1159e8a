"""How a microbatch's images are dealt out to the ranks that share its rows."""

import random

import pytest

from megatron_vl.models.common.context_parallel import equal_runs


@pytest.mark.parametrize(
    ("costs", "parts", "runs"),
    [
        ([], 2, [[], []]),
        ([5], 2, [[], [0]]),
        ([1, 1, 1, 1], 2, [[0, 1], [2, 3]]),
        ([3, 1, 1, 1], 2, [[0], [1, 2, 3]]),
        ([1, 1, 1, 9], 2, [[0, 1, 2], [3]]),
        ([2, 2], 4, [[], [0], [], [1]]),
    ],
)
def test_neighbours_stay_together_and_costs_come_out_even(costs, parts, runs):
    assert [list(run) for run in equal_runs(costs, parts)] == runs


def test_every_image_is_one_rank_s_whatever_they_cost():
    draw = random.Random(0)
    for _ in range(500):
        costs = [draw.randint(1, 100) for _ in range(draw.randint(0, 20))]
        parts = draw.randint(1, 8)
        runs = equal_runs(costs, parts)
        assert [i for run in runs for i in run] == list(range(len(costs)))
        share, largest = sum(costs) / parts, max(costs, default=0)
        assert all(sum(costs[i] for i in run) <= share + largest for run in runs)
