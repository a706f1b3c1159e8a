"""Time of device work: events around each call, warmed up, inputs rotated out of the cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

CACHE = 200 << 20  # bytes: more than any card's last-level cache


class Timer:
    """Times on one device.

    Args:
        seconds: about what one measurement may take.
    """

    def __init__(self, device: str, seconds: float = 0.15):
        self.device, self.seconds = torch.device(device), seconds

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def once(self, work: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if not self.is_cuda:
            started = time.perf_counter()
            work()
            return 1000 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def median(self, works: Sequence[Callable[[], object]]) -> float:
        """Median milliseconds of a call, over the works in turn; the same work on other inputs.

        The host queues a few calls ahead of the device, as in training: what is measured is the
        device's time, unless the host is slower.
        """
        for work in (works * 3)[: max(3, len(works))]:  # kernels are made, memory is taken
            work()
        self.wait()
        one = max(self.once(works[0]), 1e-3)
        calls = int(min(50, max(5 if self.is_cuda else 2, 1000 * self.seconds / one)))
        if not self.is_cuda:
            return statistics.median(self.once(works[i % len(works)]) for i in range(calls))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for i, (start, end) in enumerate(events):
            start.record()
            works[i % len(works)]()
            end.record()
        self.wait()
        return statistics.median(start.elapsed_time(end) for start, end in events)


def copies_beyond_cache(nbytes: int) -> int:
    """How many sets of inputs of that size no cache holds together."""
    return max(1, min(8, -(-CACHE // max(1, nbytes))))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in fp32; inf where something is not finite."""
    found, expected = found.detach().float(), expected.detach().float()
    off = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    return off if off == off else float("inf")
