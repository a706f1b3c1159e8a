"""The images and videos that raw entries name: found within their root, decoded, measured."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from PIL import Image

from megatron_vl.data.conversation import IMAGE, VIDEO, BadEntry, MediaSource
from megatron_vl.data.media import (
    MAX_ASPECT_RATIO,
    BadMedia,
    MediaInfo,
    decode_rgb,
    image_size,
    video_frames,
    video_info,
)
from megatron_vl.inputs import json_value
from megatron_vl.workers import in_parallel

FRAMES_FPS = 2.0  # of a folder of frames that does not say; what known preparation scripts assume
FRAME_EXTENSIONS = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")
_LONGEST_EXTENSION = 16  # characters with the dot: a tar's names have 100, the key most of them
_CHUNK = 64  # media a process measures in one go


@dataclass(frozen=True, kw_only=True, slots=True)
class RawMedia:
    """One image or video on disk; equal ones are measured once."""

    kind: str  # "image" or "video"
    files: tuple[Path, ...]
    separate: bool = False  # a video whose frames are `files`
    fps: float | None = None  # of separate frames

    def __str__(self) -> str:
        name = self.files[0].parent if self.separate else self.files[0]
        return f"{self.kind} {name}"


class Library:
    """Where the media of one source lie.

    Args:
        roots: directories that media paths are relative to, the first that has one wins. A path
            that leaves them is refused: an entry of a downloaded file must not name any file of
            this machine.
        scratch: directory for media that an entry carries itself.
        prefers_frames: of a video `a.mp4` with a folder `a` of frames beside it, take the frames.
    """

    def __init__(self, roots: Iterable[Path], scratch: Path, *, prefers_frames: bool = False):
        self.roots = [Path(os.path.abspath(root)) for root in roots]
        self.scratch = scratch
        self.prefers_frames = prefers_frames
        self._known: dict[MediaSource, RawMedia] = {}
        self._written = 0

    def locate(self, source: MediaSource) -> RawMedia:
        """The files of one image or video.

        Raises:
            BadEntry: they are not there, outside the roots, or have no file extension.
        """
        if source.data is not None:
            return self._write(source)
        if source not in self._known:
            try:
                self._known[source] = self._find(source)
            except (OSError, ValueError) as error:  # a path too long, or with a null byte
                if isinstance(error, BadEntry):
                    raise
                raise BadEntry(
                    "missing media", f"its {source.kind} cannot be read ({error})"
                ) from error
        return self._known[source]

    def _find(self, source: MediaSource) -> RawMedia:
        if source.frames is not None:
            files = tuple(self._file(source.kind, name) for name in source.frames)
            if not files:
                raise BadEntry("missing media", "its video has no frames")
            return self._frames(files, source.fps, None)
        if source.kind == IMAGE:
            return RawMedia(kind=IMAGE, files=(self._file(IMAGE, source.path),))
        folder = self._folder(source.path)
        try:
            file = self._file(VIDEO, source.path)
        except BadEntry:
            if folder is None:
                raise
            file = None
        if folder is not None and (file is None or self.prefers_frames):
            return self._frames(_images_in(folder), source.fps, folder)
        return RawMedia(kind=VIDEO, files=(file,))

    def _file(self, kind: str, name: str) -> Path:
        for path in self._places(kind, name):
            if path.is_file():
                if not path.suffix[1:].isalnum():
                    raise BadEntry("missing media", f"its {kind} {path} has no file extension")
                if len(path.suffix) > _LONGEST_EXTENSION:
                    raise BadEntry(
                        "missing media",
                        f"the extension of its {kind} {path} is longer than {_LONGEST_EXTENSION} "
                        f"characters; rename the file",
                    )
                return path
        raise BadEntry("missing media", f"its {kind} {self.roots[0] / name} does not exist")

    def _folder(self, name: str) -> Path | None:
        """The folder of frames that a video's path is, or is beside."""
        for path in self._places(VIDEO, name):
            for folder in (path, path.with_suffix("")):
                if folder.is_dir():
                    return folder
        return None

    def _places(self, kind: str, name: str) -> list[Path]:
        # Lexically: a link within the root may lead to another disk, as large collections do.
        places = [(root, Path(os.path.normpath(root / name))) for root in self.roots]
        inside = [path for root, path in places if path.is_relative_to(root)]
        if not inside or not name:
            raise BadEntry(
                "missing media",
                f"its {kind} {name!r} lies outside {self.roots[0]}; give --media-root a directory "
                f"that holds all media",
            )
        return inside

    def _frames(
        self, files: tuple[Path, ...], fps: float | None, folder: Path | None
    ) -> RawMedia:
        told = folder.with_name(folder.name + ".json") if folder is not None else None
        if fps is None and told is not None and told.is_file():
            try:
                fps = float(json_value(told.read_text(encoding="utf-8"))["fps"])
                if not 0 < fps < float("inf"):
                    raise ValueError(fps)
            except (ValueError, KeyError, TypeError) as error:
                raise BadEntry(
                    "unusable media", f"{told} does not give its video a number `fps`"
                ) from error
        return RawMedia(kind=VIDEO, files=files, separate=True, fps=fps or FRAMES_FPS)

    def _write(self, source: MediaSource) -> RawMedia:
        """Media that an entry carries, as files that live as long as the preparation."""
        files = []
        separate = source.kind == VIDEO and (
            len(source.data) > 1 or _extension(source.data[0]) in FRAME_EXTENSIONS
        )
        for data in source.data:
            path = self.scratch / f"{self._written:09d}.{_extension(data)}"
            path.write_bytes(data)
            files.append(path)
            self._written += 1
        if not files:
            raise BadEntry("missing media", f"its {source.kind} is empty")
        if separate:
            return self._frames(tuple(files), source.fps, None)
        return RawMedia(kind=source.kind, files=tuple(files))


def _extension(data: bytes) -> str:
    """Of a file without a name, by its first bytes."""
    import filetype

    kind = filetype.guess(data)
    if kind is None:
        raise BadEntry("unusable media", "its image or video is in no known format")
    return kind.extension


def _images_in(folder: Path) -> tuple[Path, ...]:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in files:
        if path.suffix[1:].lower() not in FRAME_EXTENSIONS or not path.is_file():
            raise BadEntry("unusable media", f"its folder of frames holds {path}, no image")
    if not files:
        raise BadEntry("missing media", f"its folder of frames {folder} is empty")
    return tuple(files)


def measure_all(
    media: Iterable[RawMedia], *, num_workers: int
) -> Iterator[tuple[RawMedia, MediaInfo | str]]:
    """Decode each image once, and of each video its ends: its sizes, or what is wrong with it.

    energon's own prepare would drop a whole shard for one that cannot be decoded.

    Raises:
        InputError: a process that decodes was killed.
    """
    media = list(media)
    chunks = [media[at : at + _CHUNK] for at in range(0, len(media), _CHUNK)]
    found = in_parallel(
        lambda chunk: [measure(one) for one in chunk], chunks, num_workers,
        option="--num-workers", name=lambda chunk: str(chunk[0].files[0]),
    )
    yield from zip(media, chain.from_iterable(found), strict=True)


def measure(media: RawMedia) -> MediaInfo | str:
    """Sizes of one image or video, or what is wrong with it."""
    try:
        if media.kind == IMAGE or media.separate:
            sizes = [_decoded_size(path) for path in media.files]
            if len(set(sizes)) > 1:
                return "its frames are not of one size"
            ((height, width), *_), count = sizes, len(sizes)
            info = MediaInfo(height=height, width=width, num_frames=count, fps=media.fps)
        else:
            data = media.files[0].read_bytes()
            info = video_info(data)
            for _ in video_frames(data, sorted({0, info.num_frames - 1})):
                pass
    except (BadMedia, OSError) as error:
        return str(error)
    if max(info.width, info.height) > MAX_ASPECT_RATIO * min(info.width, info.height):
        return f"it is {info.width} x {info.height} pixels, too long and thin"
    return info


def _decoded_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    image: Image.Image = decode_rgb(data)
    size = image.height, image.width
    if image_size(data) != size:
        raise BadMedia(f"its header says {image_size(data)}, its pixels are {size}")
    return size
