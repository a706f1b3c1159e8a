"""How many communicators a rank of a layout may hold: its groups of more than one rank."""

from __future__ import annotations

from megatron_vl.parallel.layout import Layout


def communicators(layout: Layout, *, stage: int, embedding_stage: int = 0) -> int:
    """Groups of several ranks that a rank on `stage` is in, the world's own among them.

    They are those of `megatron.core.parallel_state.initialize_model_parallel` on the device's own
    backend. A group that is never used makes no communicator, so this is the most there are.
    """
    tp, pp, cp, dp = layout.tp, layout.pp, layout.cp, layout.dp
    etp, ep, edp = layout.expert_tp, layout.ep, layout.expert_dp
    ends = {embedding_stage, pp - 1}  # they hold the word embedding
    sizes = [
        layout.world_size, layout.world_size,  # the world; all that share an optimizer
        dp * cp, dp, cp, tp, pp, tp * pp, tp * cp, tp * dp, tp * dp * cp,
        etp, ep, edp, etp * ep, etp * ep * pp,
        etp * ep * pp,  # made by Megatron-Core 0.19
        len(ends) if stage in ends else 1,
    ]
    return sum(size > 1 for size in sizes)
