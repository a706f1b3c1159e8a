"""Which checkpoint is the best so far, also of a run that went back, and when a run ends early."""

from __future__ import annotations

import json

import pytest

from megatron_vl.errors import InputError
from megatron_vl.training.checkpoint.best import BEST, Best
from megatron_vl.training.checkpoint.files import delete_old, folder, iterations
from megatron_vl.training.options.config import TrainConfig


def config(root, **options) -> TrainConfig:
    return TrainConfig.from_dict({"save": str(root), "save_best": "eval_exact", **options})


def run_of(root, *figures: tuple[int, float, float], saved=(), **options) -> Best:
    """A run with these validations, each a step, its loss and its accuracy."""
    best = Best.read(config(root, **options), 0)
    for iteration in saved:
        folder(root, iteration).mkdir(exist_ok=True)
        best.whole.add(iteration)
    for iteration, loss, exact in figures:
        best.add(iteration, loss=loss, exact=exact)
    best.write()
    return best


FIGURES = ((10, 2.0, 0.2), (20, 1.5, 0.6), (30, 1.0, 0.6), (40, float("nan"), 0.5))
EVERY = (10, 20, 30, 40)
CASES = {  # measure, checkpoints there are, iteration gone on from -> the best, validations since
    "the first of equals": ("eval_exact", EVERY, 40, 20, 2),
    "by the loss, of which one is none": ("eval_loss", EVERY, 40, 30, 1),
    "of those that were saved": ("eval_exact", (10, 40), 40, 40, 2),
    "a run that went back": ("eval_exact", EVERY, 10, 10, 0),
    "a run that went back before all": ("eval_exact", EVERY, 5, None, 0),
}


@pytest.mark.parametrize(("measure", "saved", "done", "best", "stale"), CASES.values(), ids=CASES)
def test_a_run_that_goes_on_knows_the_best_checkpoint_before_it(
    measure, saved, done, best, stale, tmp_path
):
    run_of(tmp_path, *FIGURES, saved=saved)
    found = Best.read(config(tmp_path, save_best=measure), done)
    assert (found.checkpoint, found.stale) == (best, stale)
    assert found.knows(done) == (done in EVERY)


def test_the_file_names_the_checkpoint_and_its_figure(tmp_path):
    run_of(tmp_path, *FIGURES, saved=EVERY)
    record = json.loads((tmp_path / BEST).read_text())
    assert (record["measure"], record["checkpoint"], record["value"]) == ("eval_exact", 20, 0.6)
    assert record["validations"][3] == {"iteration": 40, "eval_loss": None, "eval_exact": 0.5}


def test_only_what_is_better_than_every_checkpoint_is_to_be_saved(tmp_path):
    best = run_of(tmp_path, (10, 2.0, 0.2), saved=(10,))
    assert not best.to_be_saved()  # it is there
    for iteration, exact, wanted in ((20, 0.2, False), (30, 0.3, True), (40, 0.25, True)):
        best.add(iteration, loss=1.0, exact=exact)
        assert best.to_be_saved() == wanted  # 30 could not be saved
    best.whole.add(40)
    assert best.checkpoint == 40


def test_the_best_checkpoint_outlives_the_limit_and_a_start_that_keeps_no_best(tmp_path):
    run_of(tmp_path, *FIGURES, saved=EVERY)
    for save_best in ("eval_exact", None):
        kept = Best.read(config(tmp_path, save_best=save_best), 40).checkpoint
        assert kept == 20
    assert delete_old(tmp_path, 40, 1, {folder(tmp_path, kept).name}) == [10, 30]
    assert iterations(tmp_path) == [20, 40]


@pytest.mark.parametrize(("patience", "says"), [
    (3, ""), (2, "of the eval_exact of the last 2 validations none is better than 0.6000, of "
                 "iteration 20"),
])
def test_a_run_ends_after_so_many_validations_without_a_better_one(patience, says, tmp_path):
    end = run_of(tmp_path, *FIGURES, early_stop=patience).early_end
    assert end == (f"early-stop is {patience}: {says}" if says else "")


def test_losses_that_are_none_are_never_better(tmp_path):
    best = run_of(tmp_path, (10, float("inf"), 0.1), (20, float("nan"), 0.1), saved=(10, 20),
                  save_best="eval_loss", early_stop=2)
    assert best.checkpoint is None and best.told() == ""
    assert best.early_end.endswith("the last 2 validations none is finite")


def test_a_damaged_file_is_answered_in_one_sentence(tmp_path):
    (tmp_path / BEST).write_text('{"measure": "eval_loss"')
    with pytest.raises(InputError, match="remove it to forget the validations so far"):
        Best.read(config(tmp_path), 10)
