"""What a microbatch holds, as the means of a run's rows; no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add

from megatron_vl.errors import InputError
from megatron_vl.models.family import Grid
from megatron_vl.models.media import IMAGE, MediaLimits, StoredMedia
from megatron_vl.models.registry import family
from megatron_vl.training.layer_activations import most_patches
from megatron_vl.training.plan import Plan
from megatron_vl.training.reporting.flops import step_flops
from megatron_vl.training.rows import DataRows, RowSample

IMAGE_TOKENS = 1024  # of an image, where nothing says how many


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """Means: numbers, and FLOPs of one forward over all ranks that share the microbatch."""

    tokens: float  # with padding, as a rank computes them
    sample_tokens: float  # without
    trained: float  # tokens with a loss
    samples: float
    images: float  # and videos
    patches: float
    squared_lengths: float  # of what attention never leaves: samples, and the padding of a row
    squared_frames: float  # of patches of a frame, over every frame
    attention: float  # FLOPs of the language layers' scores and sums
    matrices: float  # of their products with weights
    vision_attention: float
    vision_matrices: float
    merger: float
    needed: float  # forward and backward, of all that is trained, without padding

    @classmethod
    def of(
        cls, plan: Plan, *, lengths: Sequence[int], images: Mapping[Grid, float], trained: int,
        padding: Sequence[int] = (),
    ) -> Microbatch:
        """Of some rows together.

        Args:
            lengths: tokens of every sample.
            images: how many there are of a grid of patches; of an image that does not end with its
                row a fraction.
            padding: tokens at the end of every row.
        """
        spec, segments = plan.spec, [*lengths, *padding]
        decoder, vision = spec.decoder, spec.vision
        attention = decoder.attention_flops(segments)

        def summed(number) -> float:
            return sum(count * number(grid) for grid, count in images.items())

        def needed(grids: Iterable[Grid], lengths: Sequence[int], trained: int) -> int:
            return sum(step_flops(spec, grids=grids, lengths=lengths, trained=trained,
                                  trainable=plan.trainable))

        vision_attention, merger = (
            summed(vision.attention_flops), summed(vision.merger_flops)) if images else (0, 0)
        return cls(
            tokens=sum(segments), sample_tokens=sum(lengths), trained=trained,
            samples=len(lengths), images=sum(images.values()), patches=summed(math.prod),
            squared_lengths=sum(length**2 for length in segments),
            squared_frames=summed(lambda grid: grid[0] * (grid[1] * grid[2]) ** 2),
            attention=attention, matrices=decoder.forward_flops(segments, 0) - attention,
            vision_attention=vision_attention, merger=merger,
            vision_matrices=summed(vision.forward_flops) - merger - vision_attention
            if images else 0,
            needed=needed([], lengths, trained) + summed(lambda grid: needed([grid], [], 0)),
        )

    @property
    def mean_length(self) -> float:
        """Tokens of a segment, in the mean over tokens."""
        return self.squared_lengths / self.tokens

    @property
    def mean_frame(self) -> float:
        """Patches of a frame, in the mean over patches."""
        return self.squared_frames / self.patches

    def __add__(self, other: Microbatch) -> Microbatch:
        return Microbatch(**{one.name: getattr(self, one.name) + getattr(other, one.name)
                             for one in fields(self)})

    def times(self, number: float) -> Microbatch:
        return Microbatch(**{one.name: getattr(self, one.name) * number for one in fields(self)})


def full_row(plan: Plan, image_tokens: int) -> Microbatch:
    """A row of one sample, all trained; with a tower, full of images of about so many tokens."""
    return Microbatch.of(plan, lengths=[plan.row_length], trained=plan.row_length,
                         images=_filling(plan, image_tokens))


def image_grid(plan: Plan, image_tokens: int) -> Grid:
    """Patches of a square image of about so many tokens, or of every image of the model."""
    vision = plan.spec.vision
    smallest = vision.smallest_grid
    side = max(1, math.isqrt(min(image_tokens, plan.row_length) // vision.num_tokens(smallest)))
    return vision.only_grid or (smallest[0], smallest[1] * side, smallest[2] * side)


def _filling(plan: Plan, image_tokens: int) -> dict[Grid, float]:
    if plan.spec.vision is None:
        return {}
    grid = image_grid(plan, image_tokens)
    return {grid: most_patches(plan) / math.prod(grid)}


def batch_of(plan: Plan, row: Sequence[RowSample]) -> Microbatch:
    """A row of these samples, with its padding."""
    rest = plan.row_length - sum(one.tokens for one in row)
    return Microbatch.of(
        plan, lengths=[one.tokens for one in row], trained=sum(one.trained for one in row),
        images=Counter(grid for one in row for grid in one.grids), padding=[rest] * (rest > 0),
    )


def mean(batches: Sequence[Microbatch]) -> Microbatch:
    return reduce(add, batches).times(1 / len(batches))


def row_patches(data: DataRows) -> list[int]:
    """Patches of every row."""
    return [sum(math.prod(grid) for one in row for grid in one.grids) for row in data.rows]


def equal_samples(
    plan: Plan, limits: MediaLimits, *, images: int, height: int, width: int, text_tokens: int
) -> DataRows:
    """One row of samples that are all alike, as many as it holds.

    Args:
        height, width: pixels of each of a sample's images, before training resizes them.
        text_tokens: all other tokens of a sample, all trained.

    Raises:
        InputError: the model's image settings cannot be read, or no row holds such a sample.
    """
    spec, grids, tokens = plan.spec, (), text_tokens
    if images:
        processor = family(spec.model_type).processor(plan.hf_dir, spec, limits)
        image = StoredMedia(kind=IMAGE, files=("0.png",), height=height, width=width)
        try:
            grids = (processor.shape(image),) * images
        except ValueError as error:
            raise InputError(f"--image-size {width}x{height}: {error}.") from error
        marks = 2 * (spec.tokens.vision_start is not None)  # around an image
        tokens += images * (processor.num_tokens(grids[0]) + marks)
    patches, limit = sum(map(math.prod, grids)), plan.config.data.max_patches_per_row
    if tokens > plan.row_length or (limit and patches > limit):
        over, mend = (f"{tokens} tokens", f"--seq-length to {tokens}") if (
            tokens > plan.row_length) else (f"{patches} patches", "--max-patches-per-row")
        raise InputError(f"a sample of {over} fits no row; raise {mend}, or lower --image-size.")
    number = plan.row_length // tokens
    if limit and patches:
        number = min(number, limit // patches)
    shown = f"{images} image{'s' * (images > 1)} of {width}x{height} and " if images else ""
    return DataRows(
        rows=((RowSample(tokens=tokens, trained=text_tokens, grids=grids),) * number,),
        source=f"samples of {shown}{text_tokens} tokens of text",
    )
