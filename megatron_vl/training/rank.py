"""What one process of a run does, from its connection to the others to the end of training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_vl.errors import InputError
from megatron_vl.launch.stop import StopRequest
from megatron_vl.launch.worker import STEPPED, beside_failure, fail
from megatron_vl.platform import be_deterministic, connect
from megatron_vl.training.checkpoint.lock import hold
from megatron_vl.training.epochs import with_steps_of_rank_0
from megatron_vl.training.loop import train
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.paths import check_paths
from megatron_vl.training.plan import plan_run
from megatron_vl.training.reporting.first_steps import Compare
from megatron_vl.training.resilience.preflight import preflight


def run_rank(
    config: TrainConfig, stop: StopRequest, *, compare: Compare | None = None
) -> None:
    """Trains; the launcher's environment variables say which rank this is.

    Args:
        compare: see `train`.

    Raises:
        InputError: paths or options that cannot be used.
    """
    if config.model.deterministic:
        be_deterministic()
    connect(timeout_minutes=config.parallel.distributed_timeout_minutes)
    if os.environ["RANK"] == "0":  # another launcher than ours has not looked
        check_paths(config)
    with _alone_in(config.checkpoint.save):
        preflight(config)
        _train(with_steps_of_rank_0(config), stop, compare)


@contextlib.contextmanager
def _alone_in(save: str | None) -> Iterator[None]:
    """Hold SAVE's lock on rank 0, before any rank looks for what to go on from: the run before may
    still be saving. All ranks call it.

    Raises:
        InputError: another run holds it, or it cannot be locked.
    """
    file, error = None, [""]
    if save is not None and os.environ["RANK"] == "0":
        try:
            file = hold(Path(save))
        except (InputError, OSError) as failed:
            error = [str(failed)]
        else:
            if file is None:
                print(f"warning: the file system of {save} has no locks, so nothing keeps a second "
                      f"run from writing there", flush=True)
    torch.distributed.broadcast_object_list(error, src=0)
    if error[0]:
        raise InputError(error[0])
    with file or contextlib.nullcontext():
        yield


def _train(config: TrainConfig, stop: StopRequest, compare: Compare | None) -> None:
    stepped = beside_failure(STEPPED)
    first_step = (lambda: None) if stepped is None else stepped.touch

    def give_up(message: str) -> None:
        first_step()  # or as good as: who hangs may be started again whenever it was
        os._exit(fail(1, message))

    train(
        plan_run(config, int(os.environ["WORLD_SIZE"])), stop=stop, give_up=give_up,
        first_step=first_step, compare=compare,
    )
