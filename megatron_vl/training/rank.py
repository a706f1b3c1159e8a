"""What one process of a run does, from its connection to the others to the end of training."""

from __future__ import annotations

import os

from megatron_vl.launch.stop import StopRequest
from megatron_vl.launch.worker import STEPPED, beside_failure, fail
from megatron_vl.platform import be_deterministic, connect
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
    preflight(config)
    if os.environ["RANK"] == "0":  # another launcher than ours has not looked
        check_paths(config)
    config = with_steps_of_rank_0(config)
    stepped = beside_failure(STEPPED)
    first_step = (lambda: None) if stepped is None else stepped.touch

    def give_up(message: str) -> None:
        first_step()  # or as good as: who hangs may be started again whenever it was
        os._exit(fail(1, message))

    train(
        plan_run(config, int(os.environ["WORLD_SIZE"])), stop=stop, give_up=give_up,
        first_step=first_step, compare=compare,
    )
