"""Time of device work: marks around each call, warmed up, inputs rotated out of the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from device import platform_of

CACHE = 200 << 20  # bytes: more than any card's last-level cache


class Timer:
    """Times on one device.

    Args:
        seconds: about what one measurement may take.
    """

    def __init__(self, device: str, seconds: float = 0.15):
        self.platform, self.seconds = platform_of(device), seconds
        self.device = self.platform.device(0)

    @property
    def runs_behind(self) -> bool:
        """Whether what is queued runs while the host goes on."""
        return not self.platform.in_host_memory

    def wait(self) -> None:
        self.platform.synchronize()

    def forget(self) -> None:
        """Give back the memory that nothing holds, and count the peak anew."""
        if self.runs_behind:
            module = torch.get_device_module(self.device)
            module.empty_cache()
            module.reset_peak_memory_stats()

    def once(self, work: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        start = self.platform.mark()
        work()
        end = self.platform.mark()
        self.wait()
        return 1000 * self.platform.seconds_between(start, end)

    def median(self, works: Sequence[Callable[[], object]]) -> float:
        """Median milliseconds of a call, over the works in turn; the same work on other inputs.

        The host queues a few calls ahead of the device, as in training: what is measured is the
        device's time, unless the host is slower.
        """
        for work in (works * 3)[: max(3, len(works))]:  # kernels are made, memory is taken
            work()
        self.wait()
        one = max(self.once(works[0]), 1e-3)
        calls = int(min(50, max(5 if self.runs_behind else 2, 1000 * self.seconds / one)))
        marks = []
        for i in range(calls):
            start = self.platform.mark()
            works[i % len(works)]()
            marks.append((start, self.platform.mark()))
        self.wait()
        return 1000 * statistics.median(
            self.platform.seconds_between(start, end) for start, end in marks)


def copies_beyond_cache(nbytes: int) -> int:
    """How many sets of inputs of that size no cache holds together."""
    return max(1, min(8, -(-CACHE // max(1, nbytes))))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in fp32; inf where something is not finite."""
    found, expected = found.detach().float(), expected.detach().float()
    off = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    return off if off == off else float("inf")
