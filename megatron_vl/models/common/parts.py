"""The parts of a model that are frozen, or given a learning rate, as one."""

from __future__ import annotations

from megatron_vl.parallel import LANGUAGE, VISION

MERGER = "merger"
PARTS = {VISION: "vision tower", MERGER: "merger", LANGUAGE: "language model"}


def part_of(name: str) -> str:
    """The key of PARTS for a weight, by its Megatron-Core name.

    The norm before the merger, which is published as part of it, is the vision tower's last.
    """
    if name.startswith(("vision_model.projection.", "vision_model.deepstack.")):
        return MERGER
    return VISION if name.startswith("vision_model.") else LANGUAGE
