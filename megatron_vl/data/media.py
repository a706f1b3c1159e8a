"""Image files to sizes, grids and patches, bit for bit as transformers' image processor does it.

H rows, W columns, P patches, D = channels x temporal patch x patch x patch numbers a patch.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from megatron_vl.errors import InputError
from megatron_vl.models.spec import VisionSpec

MAX_ASPECT_RATIO = 200  # of the longer side to the shorter; transformers' smart_resize's limit
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """Bytes that are no readable image; the message says why, the caller says which sample."""


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width of the upright image, from the file's header: no pixel is decoded.

    Raises:
        BadImage: no image format's header.
    """
    image = _open(data)
    width, height = image.size
    return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def decode_rgb(data: bytes) -> Image.Image:
    """The upright RGB image.

    Transparency is laid on white, as transformers' `convert_to_rgb` does. 16-bit gray keeps its
    high byte; PIL's own conversion would clip nearly all of it to white.

    Raises:
        BadImage: no image, or one that ends early.
    """
    image = _open(data)
    turn = _UPRIGHT.get(_orientation(image))
    try:
        image.load()
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error
        raise BadImage(f"its pixels cannot be decoded ({error})") from error
    if image.mode.startswith("I"):
        high = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(high.astype(np.uint8))
    elif "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from error
    except Exception as error:  # a damaged header: UnidentifiedImageError, OSError, SyntaxError
        raise BadImage("it is not in a format PIL can read") from error


def _orientation(image: Image.Image) -> int:
    if not image.info.keys() & {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"} and (
        image.format not in ("TIFF", "MPO")
    ):
        return 1
    try:
        # The base class' method: PNG's own decodes every pixel in search of a late EXIF chunk.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


class ImageProcessor:
    """The image side of a Hugging Face directory: its preprocessor_config.json, made fast.

    transformers' own PIL processor supplies the settings and is the reference. Between resizing and
    the flattened patches it rescales and normalises every pixel in floating point; a pixel has only
    256 values, so one table a channel, computed once by the processor itself, gives the same bits.
    """

    def __init__(self, processor, *, vision: VisionSpec):
        """`processor` is transformers' PIL image processor; `from_hf_dir` loads it."""
        self.patch_size = processor.patch_size
        self.merge_size = processor.merge_size
        self.temporal_patch_size = processor.temporal_patch_size
        self.min_pixels = processor.size["shortest_edge"]
        self.max_pixels = processor.size["longest_edge"]
        self.resample = processor.resample if processor.do_resize else None
        self.in_channels = vision.in_channels
        values = np.arange(256, dtype=np.uint8).reshape(1, 1, 256).repeat(self.in_channels, 0)
        if processor.do_rescale:
            values = processor.rescale(values, processor.rescale_factor)
        if processor.do_normalize:
            values = processor.normalize(values, processor.image_mean, processor.image_std)
        self._table = values.reshape(-1).astype(np.float32)  # [channels * 256]
        self._table_rows = (np.arange(self.in_channels, dtype=np.int16) * 256).reshape(1, -1, 1)

    @classmethod
    def from_hf_dir(cls, hf_dir: Path, *, vision: VisionSpec) -> ImageProcessor:
        """Read DIR/preprocessor_config.json.

        Raises:
            InputError: the file is missing or unreadable, or differs from config.json.
        """
        from transformers import AutoImageProcessor

        path = Path(hf_dir) / "preprocessor_config.json"
        if not path.is_file():
            raise InputError(
                f"{path} is missing; copy it from the model's Hugging Face repository."
            )
        try:
            processor = AutoImageProcessor.from_pretrained(str(hf_dir), backend="pil")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read ({_first_line(error)}); copy it again from the model's "
                f"Hugging Face repository."
            ) from error
        for name, want in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.spatial_merge_size),
            ("temporal_patch_size", vision.temporal_patch_size),
        ):
            if getattr(processor, name, None) != want:
                raise InputError(
                    f"{path} has {name} {getattr(processor, name, None)} but config.json has "
                    f"{want}; take both files from the same model."
                )
        least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
        if not 0 < least <= most:
            raise InputError(
                f"{path} asks for images of {least} to {most} pixels; give a min_pixels above 0 "
                f"and no larger than max_pixels."
            )
        return cls(processor, vision=vision)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Pixels after resizing: multiples of patch x merge, the area within the budget.

        Raises:
            BadImage: one side is over 200 times the other; Qwen2-VL takes no such image.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        if self.resample is None:
            return height, width
        try:
            return smart_resize(
                height,
                width,
                factor=self.patch_size * self.merge_size,
                min_pixels=self.min_pixels,
                max_pixels=self.max_pixels,
            )
        except (ValueError, ZeroDivisionError) as error:
            raise BadImage(f"it is {width} x {height} pixels, too long and thin") from error

    def grid(self, data: bytes) -> tuple[int, int, int]:
        """Frames, rows and columns of patches of an image file, from its header alone.

        Raises:
            BadImage: no image header, or an image too thin.
        """
        height, width = self.resized(*image_size(data))
        return 1, height // self.patch_size, width // self.patch_size

    def num_tokens(self, grid: tuple[int, int, int]) -> int:
        """Tokens the decoder sees of an image with this grid."""
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def patches(self, data: bytes) -> torch.Tensor:
        """Decode an image file to float32 [P, D].

        Raises:
            BadImage: the pixels cannot be decoded.
        """
        image = decode_rgb(data)
        height, width = self.resized(image.height, image.width)
        if self.resample is not None:
            image = image.resize((width, height), resample=self.resample)
        pixels_HWC = np.asarray(image)
        p, m, t, c = self.patch_size, self.merge_size, self.temporal_patch_size, self.in_channels
        rows, columns = height // p, width // p
        blocks = pixels_HWC.reshape(rows // m, m, p, columns // m, m, p, c)
        # Order of patches: the m x m that merge to one token stand together.
        blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # [rows/m, columns/m, m, m, c, p, p]
        index = blocks.reshape(rows * columns, c, p * p) + self._table_rows
        values = self._table.take(index)  # [P, c, p * p]
        values = np.broadcast_to(values[:, :, None], (rows * columns, c, t, p * p))
        return torch.from_numpy(values.reshape(rows * columns, c * t * p * p))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
