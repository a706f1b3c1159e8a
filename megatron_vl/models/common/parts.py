"""The parts of a model that are frozen, or given a learning rate, as one."""

from __future__ import annotations

PARTS = {"vit": "vision tower", "merger": "merger", "llm": "language model"}


def part_of(name: str) -> str:
    """The key of PARTS for a weight, by its Megatron-Core name.

    The norm before the merger, which is published as part of it, is the vision tower's last.
    """
    if name.startswith("vision_model.projection."):
        return "merger"
    return "vit" if name.startswith("vision_model.") else "llm"
