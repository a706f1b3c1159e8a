"""Image and video files to sizes and RGB pixels. H rows, W columns.

Videos are decoded by PyAV, by energon's AVDecoder where it finds the frames that are asked for.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from PIL import ExifTags, Image

from megatron_vl.errors import InputError
from megatron_vl.models.media import VIDEO, BadMedia, StoredMedia

FRAMES_AT_ONCE = 16  # of a video, decoded and held at their full size
MAX_FRAME_PIXELS = 40_000_000  # of a video; 8K has 33 million
# What PIL decodes by itself; for others it starts programs, as Ghostscript for PostScript.
# It tries them in turn: the most frequent first, the one without a mark at its beginning last.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "AVIF", "ICO", "JPEG2000", "MPO", "PPM",
           "TIFF", "TGA")
_SIDE = 112  # pixels of a thumbnail's longer side at most
_SLACK = 1.05  # by which a whole video may be shorter than its header says
_CUT = "the file is cut off"
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


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width of the upright image, from the file's header: no pixel is decoded.

    Raises:
        BadMedia: no image format's header.
    """
    image = _open(data)
    width, height = image.size
    return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def decode_rgb(data: bytes) -> Image.Image:
    """The upright RGB image.

    Transparency is laid on white, as transformers' `convert_to_rgb` does. 16-bit gray keeps its
    high byte; PIL's own conversion would clip nearly all of it to white.

    Raises:
        BadMedia: no image, or one that ends early.
    """
    return upright_rgb(load_image(data))


def load_image(data: bytes) -> Image.Image:
    """The image as its file has it, with its pixels decoded.

    Raises:
        BadMedia: no image, or one that ends early.
    """
    image = _open(data)
    try:
        image.load()
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error
        raise BadMedia(f"its pixels cannot be decoded ({error})") from error
    return image


def decoded(
    media: StoredMedia, read: Callable[[str], bytes], taken: Sequence[int]
) -> Iterator[Image.Image]:
    """The frames of a video numbered `taken`, or the one of an image, as upright RGB images.

    Args:
        read: a file's bytes by its name in `media.files`.

    Raises:
        BadMedia: it cannot be read or decoded.
    """
    if media.kind == VIDEO and not media.separate:
        return (frame for _, frame in video_frames(read(media.files[0]), taken))
    return (decode_rgb(read(media.files[number])) for number in taken)


def thumbnail(media: StoredMedia, read: Callable[[str], bytes], *, format: str = "PNG") -> bytes:
    """A small file of an image, or of a video's first frame, in a format that PIL writes.

    Args:
        read: a file's bytes by its name in `media.files`.

    Raises:
        BadMedia: it cannot be read or decoded.
    """
    (image,) = decoded(media, read, [0])
    image.thumbnail((_SIDE, _SIDE), resample=Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format=format)
    return file.getvalue()


def upright_rgb(image: Image.Image) -> Image.Image:
    """A loaded image as `decode_rgb` gives it."""
    turn = _UPRIGHT.get(_orientation(image))
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
            return Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError as error:
        raise BadMedia(str(error)) from error
    except Exception as error:  # a damaged header: UnidentifiedImageError, OSError, SyntaxError
        raise BadMedia("it is not in a format PIL can read") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this PIL was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


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


# ---- videos --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaInfo:
    """What an image, a video or its frames say of themselves."""

    height: int  # pixels, upright
    width: int
    num_frames: int = 1
    fps: float | None = None  # frames a second of a video, on average


def video_info(data: bytes) -> MediaInfo:
    """Of a video file; its packets are counted, one frame is decoded.

    Raises:
        BadMedia: no video, one without frames or rate, or one that is cut off.
    """
    shown, fps = _listed(data)
    if not shown:
        raise BadMedia("it has no video frames")
    if not fps:
        raise BadMedia("it does not say how many frames it has a second")
    ((_, first),) = _counted(data, [0], shown, fps)
    return MediaInfo(num_frames=len(shown), fps=fps, height=first.height, width=first.width)


def video_frames(data: bytes, indices: Sequence[int]) -> Iterator[tuple[float, Image.Image]]:
    """Frames of a video file by their numbers from 0, which ascend.

    energon's decoder seeks, which saves most of the decoding of a long video. But it finds a frame
    by its number from a key frame or by an even rate, and gives a neighbour where frames are shown
    before the key frame they follow in the file, or unevenly. When a frame is shown tells which one
    it is; where energon's is another, frames are decoded and counted from the first.

    Yields:
        seconds from the video's first frame at which the frame is shown, and the frame.

    Raises:
        BadMedia: a frame that cannot be decoded, or is not there.
    """
    shown, fps = _listed(data)
    for first in range(0, len(indices), FRAMES_AT_ONCE):
        wanted = indices[first : first + FRAMES_AT_ONCE]
        frames = _sought(data, wanted, shown)
        if frames is None:
            yield from _counted(data, indices[first:], shown, fps)
            return
        for index, frame in zip(wanted, frames, strict=True):
            yield shown[index] - shown[0], frame


def _listed(data: bytes) -> tuple[list[float | None], float]:
    """When each frame is shown, in ascending seconds, and frames a second; nothing is decoded.

    The times are all None in a file that does not tell them all.
    """
    with _video(data) as stream:
        container = stream.container
        shown, count, end = [], 0, 0.0
        for packet in container.demux(stream, *container.streams.audio):
            if packet.pts is None and not packet.size:
                continue  # not in the file: it tells a decoder that all were read
            time = None if packet.pts is None else float(packet.pts * packet.time_base)
            end = max(end, time or 0.0)
            if packet.stream.index == stream.index:
                count += 1
                if packet.size and not packet.is_discard:  # else it is there to be skipped
                    shown.append(time)
        if None in shown or len(set(shown)) < len(shown):
            shown = [None] * len(shown)
        else:
            shown.sort()
            # Where a file tells its length and its streams do not, it is not a guess by its size.
            length = container.duration if stream.duration is None else None
            longest = max((b - a for a, b in pairwise(shown)), default=math.inf)
            if length is not None and length / 1e6 > (end + longest) * _SLACK:
                raise BadMedia(f"it ends after {end:.1f} of its {length / 1e6:.1f} seconds; {_CUT}")
        if stream.frames > count * _SLACK:
            raise BadMedia(f"it ends after {count} of its {stream.frames} frames; {_CUT}")
        return shown, float(stream.average_rate or stream.guessed_rate or 0)


def _sought(
    data: bytes, indices: Sequence[int], shown: Sequence[float | None]
) -> list[Image.Image] | None:
    """Frames as energon's decoder finds them; None if it does not find these."""
    from megatron.energon.av import AVDecoder

    if indices[-1] >= len(shown) or shown[0] is None:
        return None
    # The middle of a frame's time: times in a file are rounded, and so is the number's start.
    ranges = [(index + 0.5, index + 0.5) for index in indices]
    try:
        clips, times = AVDecoder(io.BytesIO(data), suppress_warnings=True).get_video_clips(
            ranges, "frames"
        )
    except Exception:  # PyAV has its own kinds, and energon asserts
        return None
    if [begin for begin, _ in times] != [shown[index] for index in indices]:
        return None
    return [Image.fromarray(clip[0].permute(1, 2, 0).numpy()) for clip in clips]


def _counted(
    data: bytes, indices: Sequence[int], shown: Sequence[float | None], fps: float
) -> Iterator[tuple[float, Image.Image]]:
    """As `video_frames`, decoding every frame from the first."""
    left = list(indices)
    with _video(data) as stream:
        for number, frame in enumerate(stream.container.decode(stream)):
            if number == left[0]:
                told = number < len(shown) and shown[number] is not None
                time = shown[number] - shown[0] if told else number / fps
                yield time, Image.fromarray(frame.to_ndarray(format="rgb24"))
                if not left[1:]:
                    return
                del left[0]
    raise BadMedia(f"it ends before its frame {left[0]} (from 0); {_CUT}")


@contextmanager
def _video(data: bytes):
    """A file's video stream, opened as energon does; PyAV's many errors as one."""
    try:
        import av  # noqa: F401  (energon's decoder is an optional part of it)
    except ImportError as error:
        raise InputError("videos need PyAV, which is not installed; pip install av.") from error
    from megatron.energon.av.av_init import av_open

    try:
        with av_open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise BadMedia("it has no video frames")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_FRAME_PIXELS:
                raise BadMedia(
                    f"its frames of {stream.width} x {stream.height} pixels are over "
                    f"{MAX_FRAME_PIXELS:,}"
                )
            yield stream
    except BadMedia:
        raise
    except Exception as error:  # PyAV has its own kinds, some of them OSError or ValueError
        words = str(error).strip().splitlines()
        raise BadMedia(
            f"it cannot be decoded ({words[0] if words else type(error).__name__})"
        ) from error
