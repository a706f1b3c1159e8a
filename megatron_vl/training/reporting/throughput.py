"""What a run achieved on average, for those who know it by --log-tps."""

from __future__ import annotations

MOST_WARMUP = 10  # steps at the start that are left out, but at most half of a run's


class Throughput:
    """Sums over the steps of a run, without the first.

    Args:
        steps: how many this run will make.
        ranks: devices it runs on.
    """

    def __init__(self, steps: int, ranks: int):
        self.warmup = min(MOST_WARMUP, steps // 2)
        self.ranks = ranks
        self.first: int | None = None  # iteration that was counted first
        self.last = self.seen = self.counted = 0
        self.seconds = 0.0
        self.positions = self.tokens = self.samples = self.images = 0

    def add(self, step) -> None:
        """Count a `StepMetrics`."""
        self.seen += 1
        if self.seen <= self.warmup:
            return
        self.first, self.last = self.first or step.iteration, step.iteration
        self.counted += 1
        self.seconds += step.step_seconds
        self.positions += step.positions
        self.tokens += step.tokens
        self.samples += step.samples
        self.images += step.images

    def lines(self) -> list[str]:
        """The three figures that MindSpeed-MM's scripts end with, under their names, and more."""
        if not self.counted or not self.samples:
            return ["throughput: no step was counted"]
        left_out = f", the first {self.warmup} left out as warmup" if self.warmup else ""
        per_second = self.tokens / self.seconds
        return [
            f"throughput of iterations {self.first} to {self.last}{left_out}; without validation "
            f"and checkpoints:",
            f"Elapsed Time Per iteration: {1000 * self.seconds / self.counted:.1f} ms",
            f"Average Samples per Second: {self.samples / self.seconds:.3f}",
            f"Consumed Tokens per Second: {per_second:.3f}",
            f"Tokens per Second per Device (TGS): {per_second / self.ranks:.3f} on {self.ranks} "
            f"device{'s' * (self.ranks > 1)}",
            f"Consumed Tokens per Second with padding: {self.positions / self.seconds:.3f}",
            f"Average tokens per sample: {self.tokens / self.samples:.1f}",
            f"Total: {self.tokens:,} tokens, {self.samples:,} samples, {self.images:,} images or "
            f"videos in {self.seconds:.1f} s",
        ]
