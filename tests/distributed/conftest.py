"""Runs of the launcher that several tests look at; each is made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_launch import Workshop


@pytest.fixture(scope="session")
def workshop(shared, model_dir, wds_dir) -> Workshop:
    return Workshop(shared, model_dir, wds_dir)


@pytest.fixture(scope="session")
def plain_run(workshop) -> dict[int, dict]:
    """Ten steps on one rank, with all there is to show."""

    def train(out: Path) -> None:
        done = workshop.train(out.name, extra="--report --log-tps --device-peak-tflops 0.1 "
                                              "--profile --profile-step-start 3 "
                                              "--profile-step-end 5")
        assert done.code == 0, done.text
        said = [line for line in done.out.splitlines() if line.startswith("attention")]
        assert said[0].startswith("attention: sdpa (first that runs here; te-fused: no CUDA")

    workshop.shared.made("plain", train)
    return workshop.steps("plain")


@pytest.fixture(scope="session")
def uneven_run(workshop) -> dict[int, dict]:
    """Ten steps at PP2 with an uneven split, checkpoints at 5 and 10."""

    def train(out: Path) -> None:
        # The launcher is not told the split: the converted checkpoint carries it.
        weights = workshop.weights(1, 2, 1)
        done = workshop.train(out.name, PP=2, PRETRAIN_CHECKPOINT_PATH=weights)
        assert done.code == 0, done.text
        assert "llm 1-3, vision 2-0" in done.out

    workshop.shared.made("uneven", train)
    return workshop.steps("uneven")
