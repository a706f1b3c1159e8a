"""Runs of the launcher that several tests look at; each is made once."""

from __future__ import annotations

import pytest
from distributed_launch import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory, model_dir, wds_dir) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"), model_dir, wds_dir)


@pytest.fixture(scope="session")
def plain_run(workshop) -> dict[int, dict]:
    """Ten steps on one rank, with all there is to show."""
    done = workshop.train("plain", extra="--report --log-tps --device-peak-tflops 0.1 --profile "
                                         "--profile-step-start 3 --profile-step-end 5")
    assert done.code == 0, done.text
    said = [line for line in done.out.splitlines() if line.startswith("attention")]
    assert said == ["attention: sdpa (asked for)"]
    return workshop.steps("plain")
