"""Trackers of runs: those that are missing, those that fail, and the real ones."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from metric_log import Kept

from megatron_vl.errors import InputError
from megatron_vl.training.options.groups import LogOptions
from megatron_vl.training.reporting import trackers
from megatron_vl.training.reporting.trackers import Trackers, check_trackers

ASKED = {
    "wandb": {"wandb_project": "tests", "wandb_exp_name": "one"},
    "swanlab": {"swanlab_project": "tests", "swanlab_exp_name": "one"},
    "mlflow": {"mlflow_experiment": "tests", "mlflow_run_name": "one"},
}


@pytest.mark.parametrize("name", ASKED)
def test_a_tracker_that_is_not_installed_is_refused_with_what_to_install(name, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    check_trackers(LogOptions())
    with pytest.raises(InputError, match=f"{name}, which is not installed; run pip install {name}"):
        check_trackers(LogOptions(**ASKED[name]))


def test_a_tracker_that_fails_says_so_once_and_stops_nothing(monkeypatch):
    class Broken(Kept):
        def __init__(self, log, options):
            super().__init__()

        def log(self, values, iteration):
            raise ConnectionError("no route to host\nand more")

    monkeypatch.setitem(trackers.KINDS, "wandb", Broken)
    said = []
    running = Trackers(LogOptions(**ASKED["wandb"]), {}, said.append)
    for i in (1, 2):
        running.log({"train/loss": 1.0}, i)
    running.close()
    assert said == ["warning: wandb failed and gets no more numbers: ConnectionError: no route to "
                    "host"]


TRACKED = """
import sys
from megatron_vl.training.options.groups import LogOptions
from megatron_vl.training.reporting.trackers import Trackers
running = Trackers(LogOptions(**{asked!r}), {{"lr": 1e-3, "profile_ranks": (0,), "save": None}})
assert running.running
for i in (1, 2, 3):
    running.log({{"train/loss": 3.0 / i}}, i)
assert running.running
running.close()
"""
PLACES = {  # what keeps each on this machine, and what it then leaves there
    "wandb": ({"WANDB_MODE": "offline", "WANDB_DIR": "{}"}, "wandb/offline-run-*/*.wandb"),
    "swanlab": ({"SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": "{}"}, "run-*/*.swanlab"),
    "mlflow": ({"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_TRACKING_URI": "file:{}"},
               "*/*/metrics/train/loss"),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_real_tracker_keeps_the_numbers(name, tmp_path):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    environment, left = PLACES[name]
    environment = {key: value.format(tmp_path) for key, value in environment.items()}
    done = subprocess.run(
        [sys.executable, "-c", TRACKED.format(asked=ASKED[name])], cwd=tmp_path, text=True,
        env={**os.environ, **environment}, capture_output=True, timeout=180,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob(left)
    assert file.stat().st_size > 0
    if name == "mlflow":
        assert [row.split()[1:] for row in file.read_text().splitlines()] == [
            ["3.0", "1"], ["1.5", "2"], ["1.0", "3"]
        ]
