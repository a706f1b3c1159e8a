"""Qwen-VL's images: each is brought to one square, cut into patches row by row.

As the published `image_transform` does: resized bicubically by PIL whatever its shape, scaled to
0..1, normalised by CLIP's mean and standard deviation.

G patches a side, C numbers of a patch: channels x height x width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_vl.errors import InputError
from megatron_vl.models.family import Grid
from megatron_vl.models.media import BadMedia, MediaLimits, StoredMedia
from megatron_vl.models.qwen_vl.vision_spec import ResampledVisionSpec
from megatron_vl.models.spec import ModelSpec

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)


def processor(
    hf_dir: Path, spec: ModelSpec, limits: MediaLimits | None = None
) -> SquareProcessor:
    """The family's `megatron_vl.models.family.Processor`.

    Raises:
        InputError: limits of sizes, which a model whose images have one size cannot keep.
    """
    free = MediaLimits()
    for one in fields(MediaLimits):
        value = getattr(limits or free, one.name)
        if value != getattr(free, one.name):
            side = spec.vision.image_size
            raise InputError(
                f"{one.name.replace('_', '-')} is {value}, but {spec.model_type} takes no videos "
                f"and brings every image to {side} x {side} pixels; leave it out."
            )
    return SquareProcessor(spec.vision)


class SquareProcessor:
    """Images to patches; there are no videos."""

    resizes = False

    def __init__(self, vision: ResampledVisionSpec):
        self.vision, self.patch_dim = vision, vision.patch_dim
        values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
        # Of each value a channel's pixel may have, what it becomes: [256, channels].
        self._table = (values - np.float32(MEAN)) / np.float32(STD)

    def frames(self, media: StoredMedia) -> list[int]:
        """See `megatron_vl.models.family.Processor`."""
        return [0]

    def shape(self, media: StoredMedia) -> Grid:
        """See `megatron_vl.models.family.Processor`."""
        if media.settings is not None:
            asked = ", ".join(media.settings.to_dict())
            raise BadMedia(f"it asks for {asked}, but the model's images all have one size")
        return self.vision.only_grid

    def pixels(self, media: StoredMedia) -> tuple[int, int]:
        """See `megatron_vl.models.family.Processor`."""
        self.shape(media)
        return self.vision.image_size, self.vision.image_size

    def num_tokens(self, grid: Grid) -> int:
        """See `megatron_vl.models.family.Processor`."""
        return self.vision.num_tokens(grid)

    def seconds(self, media: StoredMedia) -> float:
        """See `megatron_vl.models.family.Processor`."""
        return 0.0

    def times(self, media: StoredMedia) -> tuple[float, ...]:
        """See `megatron_vl.models.family.Processor`."""
        return ()

    def load(
        self, media: StoredMedia, frames: Iterable[Image.Image], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `megatron_vl.models.family.Processor`; float32 [G * G, C]."""
        (image,) = frames
        if image.size != (media.width, media.height):
            raise BadMedia(
                f"it is {image.size[0]} x {image.size[1]} pixels but was prepared as "
                f"{media.width} x {media.height}"
            )
        pixels = np.asarray(image.resize([self.vision.image_size] * 2, Image.Resampling.BICUBIC))
        side, patch, channels = self.vision.side, self.vision.patch_size, self.vision.in_channels
        pixels = pixels[: side * patch, : side * patch]  # as the convolution reads them
        blocks = pixels.reshape(side, patch, side, patch, channels).transpose(0, 2, 4, 1, 3)
        values = self._table[blocks, np.arange(channels)[:, None, None]]
        patches = torch.from_numpy(values.reshape(side**2, self.patch_dim))
        return patches if out is None else out.copy_(patches)
