"""Samples that cannot be used: the first are named, all are counted, too many end the run."""

from __future__ import annotations

from collections import Counter

from megatron_vl.data.encode.samples import Skipped
from megatron_vl.errors import as_called

TOLD = 10  # samples left out for one reason that a rank names; all are counted


class LeftOut:
    """The samples that a run leaves out.

    Args:
        most: of them before it is too many.
    """

    def __init__(self, most: int):
        self.most = most
        self.total = 0  # over all ranks, each counted once
        self.told: Counter[str] = Counter()  # of them named by this rank, by reason

    def tell(self, skipped: list[Skipped]) -> None:
        """Name the first samples left out; every reader does for its own."""
        for one in skipped:
            if one.first and self.told[one.reason] < TOLD:
                print(f"skipped sample {one.sample}: {as_called(one.message)}", flush=True)
                self.told[one.reason] += 1

    def too_many(self) -> str:
        """The sentence that ends the run; empty if they are not too many."""
        if self.total <= self.most:
            return ""
        return (
            f"{self.total} samples could not be used, more than max-skipped-samples {self.most}; "
            f"look at them with megatron-vl lint, or raise it."
        )
