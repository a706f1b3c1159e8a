"""All that a rank of a stage needs: the one number of the dry run, the plan and the run itself."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.training.activations import ActivationMemory, activation_memory
from megatron_vl.training.memory import RankMemory, rank_memory
from megatron_vl.training.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Bytes of every rank of a stage."""

    held: RankMemory
    activations: ActivationMemory

    @property
    def bytes(self) -> int:
        """The most at a moment of a step, without what libraries take and gaps between tensors."""
        return self.held.device_bytes + self.activations.peak


def stage_memory(
    plan: Plan, stage: int, *, held: RankMemory | None = None, chunks: int | None = None
) -> StageMemory:
    """`held` and `chunks` where they are known: see `activation_memory`."""
    held = held or rank_memory(plan, stage)
    return StageMemory(
        held=held, activations=activation_memory(plan, stage, chunks=chunks, held=held))
