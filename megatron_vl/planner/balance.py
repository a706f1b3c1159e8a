"""How many layers a stage holds so that stages take alike long, not hold alike many."""

from __future__ import annotations

from collections.abc import Sequence

Rows = list[list[int]]  # [chunk][stage]


def balanced(
    layers: int, layer: float, extra: Sequence[Sequence[float]], *, first: int = 0
) -> Rows:
    """The split whose busiest stage is least busy, and within a stage its busiest chunk.

    Args:
        layers: of the language model; at least one for every chunk behind `first`.
        layer: seconds of one.
        extra: seconds of what else is on a chunk, [chunk][stage].
        first: chunk, in the order they run, that may hold layers; those before hold none.

    That one may hold none either: a vision tower can take longer than all other stages' layers.
    """
    stages = len(extra[0])
    chunks = [(chunk, stage) for chunk in range(len(extra)) for stage in range(stages)][first:]
    counts = [[0] * stages for _ in extra]
    busy = [sum(row[stage] for row in extra) for stage in range(stages)]
    for chunk, stage in chunks[1:]:
        counts[chunk][stage] = 1
        busy[stage] += layer
    for _ in range(layers - len(chunks) + 1):
        # Of stages that are alike the later one, which keeps fewer microbatches' activations.
        chunk, stage = min(chunks, key=lambda at: (
            busy[at[1]] + layer, extra[at[0]][at[1]] + counts[at[0]][at[1]] * layer, -at[1]))
        counts[chunk][stage] += 1
        busy[stage] += layer
    return counts


def spread(layers: int, layer: float, *, stages: int, share: float) -> list[int] | None:
    """Layers of a vision tower on the first stages, so that none but the last takes longer than
    `share`; None if one stage is enough, or all are too few.

    Args:
        layer: seconds of one.
        share: seconds of a stage.
    """
    if not layer:
        return None
    each = max(1, round(share / layer))
    used = -(-layers // each)
    if not 2 <= used <= stages:
        return None
    return [each] * (used - 1) + [layers - each * (used - 1)] + [0] * (stages - used)
