"""Experiment trackers by name: W&B, SwanLab and MLflow; none is imported unless it is asked for.

A run matters more than its curves: a tracker that fails says so once and gets no more numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Protocol

from megatron_vl.errors import InputError
from megatron_vl.training.options.groups import LogOptions

# Tracker -> (the option that asks for it, what pip installs).
TRACKERS = {
    "wandb": ("wandb-project", "wandb"),
    "swanlab": ("swanlab-project", "swanlab"),
    "mlflow": ("mlflow-experiment", "mlflow"),
}


def asked_for(log: LogOptions) -> dict[str, str]:
    """Tracker -> its project or experiment."""
    given = {name: getattr(log, flag.replace("-", "_")) for name, (flag, _) in TRACKERS.items()}
    return {name: project for name, project in given.items() if project}


def check_trackers(log: LogOptions) -> None:
    """Raises InputError: a tracker that was asked for is not installed."""
    for name in asked_for(log):
        option, package = TRACKERS[name]
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"{option} needs {name}, which is not installed; run pip install {package}, or "
                f"leave it out."
            )


class Tracker(Protocol):
    def log(self, values: dict[str, float], iteration: int) -> None: ...
    def close(self) -> None: ...


class Wandb:
    """Where and how it keeps runs is its own: WANDB_MODE, WANDB_DIR, WANDB_ENTITY and so on."""

    def __init__(self, log: LogOptions, options: dict):
        import wandb

        self.run = wandb.init(project=log.wandb_project, name=log.wandb_exp_name, config=options)

    def log(self, values: dict[str, float], iteration: int) -> None:
        self.run.log(values, step=iteration)

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    """Its own variables say the rest: SWANLAB_MODE, SWANLAB_LOG_DIR, SWANLAB_API_KEY."""

    def __init__(self, log: LogOptions, options: dict):
        import swanlab

        self.swanlab = swanlab
        swanlab.init(
            project=log.swanlab_project, experiment_name=log.swanlab_exp_name, config=options
        )

    def log(self, values: dict[str, float], iteration: int) -> None:
        self.swanlab.log(values, step=iteration)

    def close(self) -> None:
        self.swanlab.finish()


class MLflow:
    """Where it keeps runs is MLFLOW_TRACKING_URI's."""

    def __init__(self, log: LogOptions, options: dict):
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment(log.mlflow_experiment)
        mlflow.start_run(run_name=log.mlflow_run_name)
        mlflow.log_params({name: str(value)[:500] for name, value in options.items()})

    def log(self, values: dict[str, float], iteration: int) -> None:
        self.mlflow.log_metrics(values, step=iteration)

    def close(self) -> None:
        self.mlflow.end_run()


KINDS: dict[str, type[Tracker]] = {"wandb": Wandb, "swanlab": SwanLab, "mlflow": MLflow}


class Trackers:
    """All that were asked for; rank 0 makes one.

    Args:
        options: of the run, shown with it.
        say: gets the sentence about one that fails.
    """

    def __init__(self, log: LogOptions, options: dict, say: Callable[[str], None] = print):
        self.say = say
        self.running: dict[str, Tracker] = {}
        for name in asked_for(log):
            self._try(name, lambda name=name: self.running.update(
                {name: KINDS[name](log, options)}
            ))

    def log(self, values: dict[str, float], iteration: int) -> None:
        for name, tracker in list(self.running.items()):
            self._try(name, lambda tracker=tracker: tracker.log(values, iteration))

    def close(self) -> None:
        for name, tracker in list(self.running.items()):
            self._try(name, tracker.close)
        self.running.clear()

    def _try(self, name: str, call: Callable[[], None]) -> None:
        if not attempt(name, call, self.say):
            self.running.pop(name, None)


def attempt(name: str, call: Callable[[], None], say: Callable[[str], None]) -> bool:
    """Whether a call that hands numbers on worked; if not, `say` gets the sentence about it."""
    try:
        call()
    except Exception as error:  # whatever a disk, a network and another's library may raise
        first = (str(error).splitlines() or [""])[0]
        say(f"warning: {name} failed and gets no more numbers: {type(error).__name__}: {first}")
        return False
    return True
