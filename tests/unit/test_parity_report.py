"""The comparison itself: what is not finite never passes as equal."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vl.models import load_spec
from megatron_vl.parity import FP32
from megatron_vl.parity.cases import cases, make_batches, make_samples
from megatron_vl.parity.compare import Apart, Outcome, compare, worst_parameters
from megatron_vl.parity.report import bounds_of, too_far


def outcome(**changes) -> Outcome:
    usual = dict(
        logits=[torch.ones(2, 3), torch.ones(2, 3)], loss=1.0,
        gradients={name: torch.ones(2) for name in "abcdefg"},
    )
    return Outcome(**{**usual, **changes})


def test_equal_outcomes_differ_by_nothing():
    same = compare("one", outcome(), outcome())
    assert same.logits == same.loss == same.gradient == Apart(0.0, 0.0)
    assert len(same.gradients) == 7 and not too_far(same, bounds_of(None, []))


def test_of_gradients_that_are_all_zero_any_difference_is_infinite():
    none = outcome(gradients={"a": torch.zeros(2)})
    assert compare("one", none, none).gradient == Apart(0.0, 0.0)
    ours = outcome(gradients={"a": torch.full((2,), 0.5)})
    assert compare("one", ours, none).gradient == Apart(math.inf, 0.5)


@pytest.mark.parametrize("where", ["logits", "loss", "gradient"])
def test_a_nan_anywhere_is_infinitely_far_off(where):
    ours = outcome()
    if where == "logits":
        ours.logits[1][0, 0] = math.nan
    elif where == "gradient":
        ours.gradients["b"][1] = math.nan
    else:
        ours = outcome(loss=math.nan)
    different = compare("one", ours, outcome())
    assert getattr(different, where) == Apart(math.inf, math.inf)
    assert too_far(different, {"logits": 1e9, "loss": 1e9, "gradient": 1e9})
    if where == "gradient":
        assert different.worst == "b"


def test_the_five_parameters_furthest_off_are_named_with_both_errors_and_their_case():
    theirs = {name: torch.full((2,), 2.0) for name in "abcdefg"}
    ours = {name: 2.0 + 0.01 * number * torch.tensor([0.0, 1.0])
            for number, name in enumerate("abcdefg")}
    differences = [
        compare("one", outcome(gradients=ours), outcome(gradients=theirs)),
        compare("two", outcome(gradients={**ours, "a": 2.5 * torch.ones(2)}),
                outcome(gradients=theirs)),
    ]
    (name, apart, case), *others = worst_parameters(differences)
    assert (name, apart.absolute, apart.relative, case) == ("a", 0.5, 0.25, "two")
    assert [name for name, *_ in others] == ["g", "f", "e", "d"]
    assert others[0][1].absolute == pytest.approx(0.06)
    assert others[0][1].relative == pytest.approx(0.03)


def test_sixteen_bits_may_be_twice_as_far_off_as_transformers_own():
    own = [compare("one", outcome(loss=1.5, logits=[torch.full((2, 3), 1.01)] * 2,
                                     gradients={**outcome().gradients, "c": torch.full((2,), 1.1)}),
                   outcome())]
    bounds = bounds_of(None, own)
    assert bounds == pytest.approx({"logits": 0.02, "loss": 0.02, "gradient": 0.2}, rel=1e-5)
    assert too_far(own[0], bounds)  # by its loss
    assert set(bounds_of(1e-3, own).values()) == {1e-3}
    assert set(bounds_of(None, []).values()) == {FP32}


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_cut_evenly_over_any_number_of_ranks(packed, experts_model_dir):
    spec = load_spec(experts_model_dir)
    for case in cases(spec, packed):
        samples = make_samples(spec, case)
        for batch in make_batches(spec, case, samples, parts=3, vary=not packed):
            assert batch.tokens.shape[1] % 3 == 0
