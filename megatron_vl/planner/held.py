"""What ranks hold, computed once for all layouts that hold the same."""

from __future__ import annotations

from megatron_vl.training.activations import cross_entropy_chunks
from megatron_vl.training.memory import RankMemory, rank_memory
from megatron_vl.training.plan import Plan
from megatron_vl.training.stage_memory import StageMemory, stage_memory


class HeldMemory:
    """`rank_memory` of plans whose options differ in their layout and batch alone."""

    def __init__(self) -> None:
        self._known: dict[tuple, RankMemory] = {}

    def __call__(self, plan: Plan, stage: int) -> RankMemory:
        layout = plan.layout
        # Data and context ranks share gradients alike.
        key = (layout.tp, layout.vit_tp, layout.ep, layout.etp, layout.dp * layout.cp, plan.split,
               stage)
        if key not in self._known:
            self._known[key] = rank_memory(plan, stage)
        return self._known[key]

    def chunks(self, plan: Plan) -> int:
        """Of cross-entropy, by default."""
        return cross_entropy_chunks(plan, held=self(plan, plan.layout.pp - 1))

    def stage(self, plan: Plan, stage: int, *, chunks: int) -> StageMemory:
        """All that a rank of a stage needs."""
        return stage_memory(plan, stage, held=self(plan, stage), chunks=chunks)
