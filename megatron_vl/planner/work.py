"""Seconds that a microbatch takes on a part of the model; no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Seconds of one microbatch: of the device, and of Python that queues its operations."""

    forward: float = 0.0
    backward: float = 0.0
    forward_host: float = 0.0
    backward_host: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            forward=self.forward + other.forward, backward=self.backward + other.backward,
            forward_host=self.forward_host + other.forward_host,
            backward_host=self.backward_host + other.backward_host,
        )

    def times(self, number: float) -> Work:
        return Work(
            forward=self.forward * number, backward=self.backward * number,
            forward_host=self.forward_host * number, backward_host=self.backward_host * number,
        )

    def together(self, *, runs_ahead: bool) -> Work:
        """Device and host as one: the longer, or both where the host waits for the device."""
        both = max if runs_ahead else lambda *seconds: sum(seconds)
        return Work(forward=both(self.forward, self.forward_host),
                    backward=both(self.backward, self.backward_host))

    @property
    def seconds(self) -> float:
        """The longer of device and host."""
        return max(self.forward, self.forward_host) + max(self.backward, self.backward_host)
