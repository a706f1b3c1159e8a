"""examples/dlc/train.sh on two hosts, with the variables that DLC sets."""

from __future__ import annotations

import pytest
from commands import ROOT

from hosts import Hosts, why_not

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs")]


def test_two_hosts_of_one_process_train(tmp_path, model_dir, wds_dir):
    (tmp_path / "hosts").mkdir()
    settings = {
        "CODE": ROOT, "DATA": wds_dir, "WEIGHTS": model_dir, "OUTPUT": tmp_path / "out",
        "MODEL_SIZE": "auto", "GLOBAL_BATCH_SIZE": 2, "SEQ_LEN": 256, "PRECISION": "fp32", "TP": 1,
        "PP": 2, "STEPS": 2, "MP_EXTRA": "--eval-interval 0 --packing-buffer-size 16",
    }
    with Hosts(tmp_path / "hosts", "dlc-master-0", "dlc-worker-0") as hosts:
        jobs = [
            host.start(
                ["bash", ROOT / "examples" / "dlc" / "train.sh"], **settings, WORLD_SIZE=2,
                RANK=node, MASTER_ADDR="dlc-master-0", MASTER_PORT=23456, NPROC_PER_NODE=1,
            ) for node, host in enumerate(hosts)
        ]
        codes = [job.wait(timeout=180) for job in jobs]
        first, second = (job.text for job in jobs)
    assert codes == [0, 0], first + second
    assert "node 0 of 2, 1 processes each, node 0 is dlc-master-0:23456 (PAI-DLC)" in first
    assert "preflight: 2 ranks on 2 hosts agree" in first and "iteration 2/2" in first
    assert "node 1 of 2" in second and "iteration" not in second
    assert list((tmp_path / "out" / "checkpoint").glob("*/iter_0000002"))
