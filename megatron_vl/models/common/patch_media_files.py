"""The files beside config.json that say how pixels are made: looked at without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_vl.errors import InputError
from megatron_vl.models.family import COPY_AGAIN
from megatron_vl.models.spec import ModelSpec
from megatron_vl.models.tower_spec import VisionSpec
from megatron_vl.typed import Number, Positive, Shape, Size, read_file

IMAGE_SETTINGS, VIDEO_SETTINGS = "preprocessor_config.json", "video_preprocessor_config.json"
JOINT_SETTINGS = "processor_config.json"  # where transformers 5 saves both
VIDEO_SIZE = 128 * 28 * 28, 768 * 28 * 28  # transformers' Qwen2VLVideoProcessor.size


class Edges(Shape):
    """Least and most pixels, under the names of one age or another."""

    shortest_edge: Size | None = None
    longest_edge: Size | None = None


class MediaFile(Shape):
    """Settings of images or of videos; what is null or missing, transformers knows."""

    size: Edges | None = None
    min_pixels: Size | None = None
    max_pixels: Size | None = None
    patch_size: Size | None = None
    merge_size: Size | None = None
    temporal_patch_size: Size | None = None
    do_resize: bool | None = None
    do_rescale: bool | None = None
    do_normalize: bool | None = None
    resample: Annotated[int, Field(ge=0, le=5)] | None = None
    rescale_factor: Number | None = None
    image_mean: list[Number] | None = None
    image_std: list[Positive] | None = None
    cap_pixels_per_frame: bool | None = None


class JointFile(Shape):
    """processor_config.json"""

    image_processor: MediaFile | None = None
    video_processor: MediaFile | None = None


def missing_media_files(hf_dir: Path) -> list[str]:
    """Names of those that a Hugging Face directory lacks."""
    there = any((hf_dir / name).is_file() for name in (IMAGE_SETTINGS, JOINT_SETTINGS))
    return [] if there else [IMAGE_SETTINGS]


def check_media_files(hf_dir: Path, spec: ModelSpec, *, edges_alone: bool = False) -> None:
    """See `video_size`.

    Raises:
        InputError: one is missing, or it can be told already that it cannot be used.
    """
    image_settings(hf_dir, spec.vision)
    video_size(hf_dir, VIDEO_SIZE, edges_alone=edges_alone)


def image_settings(hf_dir: Path, vision: VisionSpec) -> Path:
    """The file that images are made by, looked at as far as it can be without transformers.

    Raises:
        InputError: it is missing or unreadable, or differs from config.json.
    """
    path, joint = hf_dir / IMAGE_SETTINGS, hf_dir / JOINT_SETTINGS
    if not path.is_file():
        if not joint.is_file():
            raise InputError(f"{path} is missing; {COPY_AGAIN}.")
        path = joint
    settings = read_file(path, JointFile if path == joint else MediaFile, mend=COPY_AGAIN)
    settings = (settings.image_processor if path == joint else settings) or MediaFile()
    for name in ("image_mean", "image_std"):
        numbers = getattr(settings, name)
        if numbers is not None and len(numbers) != vision.in_channels:
            raise InputError(
                f"{path} has {len(numbers)} numbers as {name} but config.json has "
                f"{vision.in_channels} channels; take both files from the same model."
            )
    check_patches(path, settings, vision, whole=False)
    return path


def check_patches(path: Path, settings, vision: VisionSpec, *, whole: bool = True) -> None:
    """Whether patches are those of config.json.

    Args:
        settings: what has patch_size and the like.
        whole: whether it must say all of them.

    Raises:
        InputError: they are not.
    """
    for name, want in (
        ("patch_size", vision.patch_size),
        ("merge_size", vision.spatial_merge_size),
        ("temporal_patch_size", vision.temporal_patch_size),
    ):
        found = getattr(settings, name, None)
        if found != want and (whole or found is not None):
            raise InputError(
                f"{path} has {name} {found} but config.json has {want}; take both files from the "
                f"same model."
            )


def video_size(
    hf_dir: Path, default: tuple[int, int], *, edges_alone: bool = False
) -> tuple[int, int] | None:
    """Least and most pixels that the model's video settings ask for; None without any.

    Args:
        default: where the settings name none.
        edges_alone: transformers reads `size` alone, and passes over min_pixels and max_pixels.

    Raises:
        InputError: they cannot be used.
    """
    for name, kind in ((VIDEO_SETTINGS, MediaFile), (JOINT_SETTINGS, JointFile)):
        path = hf_dir / name
        if not path.is_file():
            continue
        settings = read_file(path, kind, mend=COPY_AGAIN)
        settings = settings.video_processor if kind is JointFile else settings
        if settings is None:
            continue
        if settings.cap_pixels_per_frame:
            raise InputError(
                f"{path} sets cap_pixels_per_frame, which is not supported; set it to false, and "
                f"bound a frame by --video-max-pixels."
            )
        edges = settings.size or Edges()
        for given, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            asked = getattr(settings, given)
            if edges_alone and asked not in (None, getattr(edges, edge)):
                raise InputError(
                    f"{path} sets {given} {asked}, which videos of this model are not sized by; "
                    f"give the pixels of a whole video as {edge} of size, and remove {given}."
                )
        least = settings.min_pixels or edges.shortest_edge or default[0]
        most = settings.max_pixels or edges.longest_edge or default[1]
        if least > most:
            raise InputError(f"{path} asks for frames of {least} to {most} pixels; {COPY_AGAIN}.")
        return least, most
    return None
