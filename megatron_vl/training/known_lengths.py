"""Stages that know by themselves how long the rows are that come to them.

Of rows that vary in length Megatron-Core sends the shape ahead of every tensor, and the host waits
for the device until it is there. But every stage has a microbatch's integers before its hidden
states come: see `training.exchange`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection

_NOTHING = [0, 0, 0]
# What a schedule asks for with messages that are not its own.
_GROUPS = ["tp", "pp", "cp", "embd", "pos_embd", "dp_cp"]


class KnownLengths(P2PCommunicator):
    """Messages of the schedule without virtual stages, whose shapes are not sent.

    Args:
        config: of a chunk that is run.
        next_shape: of the hidden states of the microbatch that this stage runs forward next.
    """

    def __init__(self, config, next_shape: Callable[[], Sequence[int]]):
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        self._next_shape = next_shape
        self._left: deque[Sequence[int]] = deque()  # shapes sent on, whose gradients are to come

    def _communicate_shapes(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next):
        """Shapes of what comes from the stage before, and from the one behind."""
        if tensor_send_next is not None:
            self._left.append(tensor_send_next.shape)
        return (self._next_shape() if recv_prev else _NOTHING,
                self._left.popleft() if recv_next else _NOTHING)


def messages(config, next_shape: Callable[[], Sequence[int]]) -> dict:
    """The arguments by which Megatron-Core's schedule takes these messages, where it needs them."""
    if config.pipeline_model_parallel_size == 1 or not config.variable_seq_lengths:
        return {}
    return dict(
        p2p_communicator=KnownLengths(config, next_shape),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(_GROUPS),
    )
