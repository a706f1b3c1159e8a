"""What a microbatch holds, and the seconds that it takes on a part of the model; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_vl.models.family import Grid
from megatron_vl.training.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """What a microbatch holds, over all ranks that share it; all its tokens are trained."""

    lengths: tuple[int, ...]  # tokens of every sample
    # Patches of an image, and how many images there are of it: a fraction where a row cuts one off.
    images: tuple[tuple[Grid, float], ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def patches(self) -> float:
        return self.of_images(math.prod)

    @property
    def grid(self) -> Grid | None:
        """Of its first images."""
        return self.images[0][0] if self.images else None

    @property
    def mean_length(self) -> float:
        """Tokens of a sample, in the mean over tokens."""
        return sum(length**2 for length in self.lengths) / self.tokens

    def of_images(self, of: Callable[[Grid], float]) -> float:
        """The sum over all images of what `of` says of a grid."""
        return sum(number * of(grid) for grid, number in self.images)


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


def microbatch(plan: Plan, image_tokens: int) -> Microbatch:
    """The rows of a microbatch, full of images of about so many tokens where there is a tower."""
    rows, vision = plan.config.batch.micro_batch_size, plan.spec.vision
    lengths = (plan.row_length,) * rows
    if vision is None:
        return Microbatch(lengths=lengths)
    smallest = vision.smallest_grid
    most = -(-plan.row_length // vision.num_tokens(smallest)) * math.prod(smallest)
    patches = min(most, plan.config.data.max_patches_per_row or most)
    side = max(1, math.isqrt(min(image_tokens, plan.row_length) // vision.num_tokens(smallest)))
    grid = vision.only_grid or (smallest[0], smallest[1] * side, smallest[2] * side)
    return Microbatch(lengths=lengths, images=((grid, rows * patches / math.prod(grid)),))
