"""Computed again or kept: the same gradients in every kind of layout."""

from __future__ import annotations

import sys

import pytest
from commands import ROOT, run

RANK = ROOT / "tests" / "distributed" / "recompute_ranks.py"


@pytest.mark.parametrize(("ranks", "layouts"), [(1, 1), (2, 5)])
def test_gradients_are_those_without_recompute(ranks, layouts, model_dir):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    done = run([sys.executable, *(start if ranks > 1 else []), RANK, model_dir])
    assert done.code == 0, done.text
    assert done.out.count("7 ways") == layouts, done.text
