"""Says once when more of a run is padding than samples."""

from __future__ import annotations

STEPS = 10  # that are looked at


class PaddingWatch:
    """Counts the first steps of a start.

    Args:
        packing_buffer_size: 0 where a row holds one sample.
    """

    def __init__(self, packing_buffer_size: int):
        self.buffer = packing_buffer_size
        self.steps = self.positions = self.tokens = 0

    def add(self, positions: int, tokens: int, *, last: bool = False) -> str:
        """A sentence, once; empty where there is nothing to say.

        Args:
            positions: of a step's rows, with padding.
            tokens: of its samples.
            last: the run ends with this step.
        """
        if self.steps >= STEPS:
            return ""
        self.steps = STEPS if last else self.steps + 1
        self.positions, self.tokens = self.positions + positions, self.tokens + tokens
        if self.steps < STEPS or 2 * self.tokens >= self.positions:
            return ""
        mend = (
            f"packing-buffer-size is {self.buffer}; a larger one fills rows better, where samples "
            f"are not as long as rows" if self.buffer else
            "with packing-buffer-size, as 1000, samples share rows of seq-length tokens"
        )
        share = 1 - self.tokens / self.positions
        return f"{share:.0%} of what the model goes through is padding: {mend}"
