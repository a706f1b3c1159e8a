"""Optimizer state in host memory: the same updates, and the same resumed."""

from __future__ import annotations

import re
import sys

from commands import ROOT, run

RANK = ROOT / "tests" / "distributed" / "offload_rank.py"


def test_any_share_in_host_memory_gives_the_same_updates_and_resumes(model_dir, wds_dir, tmp_path):
    done = run([sys.executable, RANK, model_dir, wds_dir, tmp_path])
    assert done.code == 0, done.text
    found = re.findall(r"share (\S+): (\S+) of (?:an )?(\S+) state in host memory; equal", done.out)
    assert [(share, of) for share, _, of in found] == [
        *((share, "the") for share in ("None", "0.0", "0.5", "1.0")),
        ("None", "adapter's"), ("0.5", "adapter's")]
    host = [float(one) for _, one, _ in found]
    assert host[:2] == [0, 0] and 0.5 <= host[2] < 1 == host[3]
    assert host[4] == 0 and 0.4 < host[5] < 1
