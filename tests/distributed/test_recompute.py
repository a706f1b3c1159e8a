"""Computed again or kept: the same gradients in every kind of layout."""

from __future__ import annotations

import sys

import pytest
from commands import ROOT, run

RANK = ROOT / "tests" / "distributed" / "recompute_ranks.py"


@pytest.mark.parametrize(("ranks", "layouts", "model"), [
    (1, 1, "model_dir"), (2, 5, "model_dir"), (1, 1, "deepstack_model_dir"),
])
def test_gradients_are_those_without_recompute(ranks, layouts, model, request):
    model_dir = request.getfixturevalue(model)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    done = run([sys.executable, *(start if ranks > 1 else []), RANK, model_dir])
    assert done.code == 0, done.text
    assert done.out.count("7 ways") == layouts, done.text
