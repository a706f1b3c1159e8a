"""How many language layers a stage holds so that stages take alike long, not hold alike many."""

from __future__ import annotations

from collections.abc import Sequence

Rows = list[list[int]]  # [chunk][stage]


def balanced(layers: int, layer: float, extra: Sequence[Sequence[float]]) -> Rows:
    """The split whose busiest stage is least busy, and within a stage its busiest chunk.

    Args:
        layers: of the language model; at least one for every chunk but the first.
        layer: seconds of one.
        extra: seconds of what else is on a chunk, [chunk][stage].

    The first chunk may hold none: a vision tower can take longer than all other stages' layers.
    """
    chunks = [(chunk, stage) for chunk in range(len(extra)) for stage in range(len(extra[0]))]
    counts = [[1] * len(row) for row in extra]
    counts[0][0] = 0
    busy = [sum(row[stage] for row in extra) for stage in range(len(extra[0]))]
    for _, stage in chunks[1:]:
        busy[stage] += layer
    for _ in range(layers - len(chunks) + 1):
        # Of stages that are alike the later one, which keeps fewer microbatches' activations.
        chunk, stage = min(chunks, key=lambda at: (
            busy[at[1]] + layer, extra[at[0]][at[1]] + counts[at[0]][at[1]] * layer, -at[1]))
        counts[chunk][stage] += 1
        busy[stage] += layer
    return counts
