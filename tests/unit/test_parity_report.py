"""The comparison itself: what is not finite never passes as equal."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vl.training.parity import CASES, Outcome, compare


def outcome() -> Outcome:
    return Outcome(
        logits=[torch.ones(2, 3), torch.ones(2, 3)], loss=1.0,
        gradients={name: torch.ones(2) for name in "abc"},
    )


def test_equal_outcomes_differ_by_nothing():
    same = compare(CASES[0], outcome(), outcome())
    assert (same.logits, same.loss, same.gradient, same.parameters) == (0.0, 0.0, 0.0, 3)


@pytest.mark.parametrize("where", ["logits", "loss", "gradient"])
def test_a_nan_anywhere_is_infinitely_far_off(where):
    ours = outcome()
    if where == "logits":
        ours.logits[1][0, 0] = math.nan
    elif where == "gradient":
        ours.gradients["b"][1] = math.nan
    else:
        ours = Outcome(logits=ours.logits, loss=math.nan, gradients=ours.gradients)
    different = compare(CASES[0], ours, outcome())
    assert getattr(different, where) == math.inf
    if where == "gradient":
        assert different.worst == "b"
