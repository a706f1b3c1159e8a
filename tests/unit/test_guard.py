"""Which steps may change the weights."""

from __future__ import annotations

import math

import pytest

from megatron_vl.errors import InputError
from megatron_vl.training.resilience.guard import LEAST, NORMS, StepGuard


def guard(spike: float = 10.0, norms=(1.0,) * LEAST, **changes) -> StepGuard:
    made = StepGuard(**{"max_skipped": 2, **changes}, spike=spike)
    for norm in norms:
        made.accept(norm)
    return made


STEPS = {  # loss, norm -> what is wrong with it
    "usual": (1.0, 9.9, ""),
    "loss nan": (math.nan, 1.0, "the loss is not finite"),
    "loss infinite": (math.inf, 1.0, "the loss is not finite"),
    "gradient nan": (1.0, math.nan, "the gradient is not finite"),
    "gradient infinite": (1.0, math.inf, "the gradient is not finite"),
    "spike": (1.0, 25.0, "the gradient norm 25 is 25.0 times the usual 1"),
}


@pytest.mark.parametrize(("loss", "norm", "wrong"), STEPS.values(), ids=STEPS)
def test_a_step_is_judged_by_its_loss_and_its_norm(loss, norm, wrong):
    assert guard().fault(loss, norm) == wrong


def test_a_spike_is_one_against_the_median_of_the_latest_updates():
    assert guard(spike=0.0).fault(1.0, 1e9) == "", "only where asked for"
    assert guard(norms=(1.0,) * (LEAST - 1)).fault(1.0, 1e9) == "", "nothing is usual yet"
    # A norm that was let through does not become the measure.
    assert "times the usual 1" in guard(norms=(1.0,) * LEAST + (9.0,) * 7).fault(1.0, 11.0)
    assert guard(norms=(1.0,) * 99 + (5.0,) * NORMS).fault(1.0, 11.0) == "", "older ones are gone"


def test_skipped_steps_are_counted_over_restarts_and_too_many_end_the_run():
    first = guard()
    said = first.skip(7, "the loss is not finite", "the samples of its row are a, b")
    assert said == ("skipped iteration 7: the loss is not finite; the samples of its row are a, b "
                    "(1 of at most 2 skipped steps)")
    second = guard(norms=())
    second.restore(first.state())
    second.skip(8, "the loss is not finite", "its samples were c")
    assert second.state() == {"skipped": 2, "norms": [1.0] * LEAST}
    with pytest.raises(InputError, match="3 steps were skipped, more than max-skipped-steps 2"):
        second.skip(9, "the loss is not finite", "its samples were d")
    with pytest.raises(InputError, match="iteration 1: .* with it 1 step was skipped"):
        guard(max_skipped=0).skip(1, "the loss is not finite", "its samples were e")


def test_a_checkpoint_without_the_guards_state_starts_it_anew():
    made = guard()
    made.restore({})
    assert made.state() == {"skipped": 0, "norms": []}
