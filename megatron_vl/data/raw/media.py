"""The images and videos that raw entries name: found within their root, decoded, measured."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from megatron_vl.data.conversation import BadEntry, MediaSource
from megatron_vl.data.encode.media import (
    MediaInfo,
    image_size,
    load_image,
    upright_rgb,
    video_frames,
    video_info,
)
from megatron_vl.data.media_keys import rate
from megatron_vl.errors import shown
from megatron_vl.inputs import json_value
from megatron_vl.models.media import IMAGE, MAX_ASPECT_RATIO, MAX_FPS, VIDEO, BadMedia
from megatron_vl.workers import in_parallel

FRAMES_FPS = 2.0  # of a folder of frames that does not say; what known preparation scripts assume
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}  # of PIL's formats
_LONGEST = 5  # characters of an extension that is taken from a name
_CHUNK = 64  # media a process measures in one go


@dataclass(frozen=True, kw_only=True, slots=True)
class RawMedia:
    """One image or video on disk; equal ones are measured once."""

    kind: str  # "image" or "video"
    files: tuple[Path, ...]
    separate: bool = False  # a video whose frames are `files`
    fps: float | None = None  # of separate frames
    carried: bool = False  # the entry has its bytes; `files` live as long as the preparation

    def __str__(self) -> str:
        if self.carried:
            return f"{self.kind}, whose bytes the entry itself has,"
        name = self.files[0].parent if self.separate else self.files[0]
        return f"{self.kind} {shown(name)}"


class StoredFile(NamedTuple):
    """What the bytes of one of a medium's files say of it, whatever it is called."""

    extension: str  # as in "0.jpg", its name in a shard
    metadata: str | None  # JSON of what energon's index keeps of it; None: nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One image or video that can be decoded."""

    info: MediaInfo
    files: tuple[StoredFile, ...]  # as many as the medium's


class Library:
    """Where the media of one source lie.

    Args:
        roots: directories that media paths are relative to, or to `images` in them; the first that
            has one wins. A path that leaves them is refused: an entry of a downloaded file must not
            name any file of this machine.
        scratch: directory for media that an entry carries itself.
        prefers_frames: of a video `a.mp4` with a folder `a` of frames beside it, take the frames.
    """

    def __init__(self, roots: Iterable[Path], scratch: Path, *, prefers_frames: bool = False):
        self.roots = [Path(os.path.abspath(root)) for root in roots]
        self._within = [*self.roots, *(root.resolve() for root in self.roots)]
        self.scratch = scratch
        self.prefers_frames = prefers_frames
        self._known: dict[MediaSource, RawMedia] = {}

    def locate(self, source: MediaSource) -> RawMedia:
        """The files of one image or video.

        Raises:
            BadEntry: they are not there, or outside the roots.
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
                return path
        raise BadEntry("missing media", f"its {kind} {shown(self.roots[0] / name)} does not exist")

    def _folder(self, name: str) -> Path | None:
        """The folder of frames that a video's path is, or is beside."""
        for path in self._places(VIDEO, name):
            for folder in (path, path.with_suffix("")):
                if folder.is_dir():
                    return folder
        return None

    def _places(self, kind: str, name: str) -> list[Path]:
        # Lexically: a link within the root may lead to another disk, as large collections do.
        inside = []
        for root in self.roots:
            for base, within in ((root, self._within), (root / "images", [root / "images"])):
                path = Path(os.path.normpath(base / name))
                if path not in inside and any(map(path.is_relative_to, within)):
                    inside.append(path)
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
                fps = rate(json_value(told.read_text(encoding="utf-8"))["fps"])
            except (ValueError, KeyError, TypeError):
                fps = None
            if fps is None:
                raise BadEntry(
                    "unusable media", f"{told} does not give its video a number `fps`"
                )
        return RawMedia(kind=VIDEO, files=files, separate=True, fps=fps or FRAMES_FPS)

    def _write(self, source: MediaSource) -> RawMedia:
        """Media that an entry carries, as files that live as long as the preparation.

        What several entries carry is one file, and so one medium.
        """
        separate = source.kind == VIDEO and (
            len(source.data) > 1 or _kind(source.data[0]).startswith("image/")
        )
        files = [self.scratch / hashlib.sha256(data).hexdigest() for data in source.data]
        for path, data in zip(files, source.data, strict=True):
            if not path.exists():
                path.write_bytes(data)
        if not files:
            raise BadEntry("missing media", f"its {source.kind} is empty")
        if separate:
            return replace(self._frames(tuple(files), source.fps, None), carried=True)
        return RawMedia(kind=source.kind, files=tuple(files), carried=True)


def _kind(data: bytes) -> str:
    """The MIME type that the first bytes of a file say, or ""."""
    import filetype

    return filetype.guess_mime(data) or ""


def _images_in(folder: Path) -> tuple[Path, ...]:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in files:
        if not path.is_file():
            raise BadEntry("unusable media", f"its folder of frames holds {path}, no image")
    if not files:
        raise BadEntry("missing media", f"its folder of frames {folder} is empty")
    return tuple(files)


def measure_all(
    media: Iterable[RawMedia], *, num_workers: int
) -> Iterator[tuple[RawMedia, Measured | str]]:
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


def measure(media: RawMedia) -> Measured | str:
    """One image or video by its bytes, or what is wrong with it."""
    try:
        if media.kind == IMAGE or media.separate:
            decoded = [_image(path, media.separate) for path in media.files]
            sizes, files = zip(*decoded, strict=True)
            if len(set(sizes)) > 1:
                return "its frames are not of one size"
            (height, width), count = sizes[0], len(sizes)
            info = MediaInfo(height=height, width=width, num_frames=count, fps=media.fps)
        else:
            data = media.files[0].read_bytes()
            info = video_info(data)
            for _ in video_frames(data, sorted({0, info.num_frames - 1})):
                pass
            files = (_video_file(data, media.files[0]),)
    except (BadMedia, OSError) as error:
        return str(error)
    if max(info.width, info.height) > MAX_ASPECT_RATIO * min(info.width, info.height):
        return f"it is {info.width} x {info.height} pixels, too long and thin"
    if info.fps is not None and info.fps > MAX_FPS:
        return f"it has {info.fps:,.0f} frames a second"
    return Measured(info=info, files=tuple(files))


def _image(path: Path, is_frame: bool) -> tuple[tuple[int, int], StoredFile]:
    """Upright height and width of an image, and its file."""
    data = path.read_bytes()
    try:
        image = load_image(data)
        upright = upright_rgb(image)
        size = upright.height, upright.width
        if image_size(data) != size:
            raise BadMedia(f"its header says {image_size(data)}, its pixels are {size}")
    except BadMedia as error:
        frame, kind = f"its frame {path.name}: " if is_frame else "", _kind(data)
        if kind and not kind.startswith("image/"):
            raise BadMedia(f"{frame}by its bytes it is {kind}, no image") from error
        raise BadMedia(f"{frame}{error}") from error
    told = {"width": image.width, "height": image.height, "format": image.format,
            "mode": image.mode}
    extension = _EXTENSIONS.get(image.format, image.format.lower())
    return size, StoredFile(extension, _compact(told))


def _video_file(data: bytes, path: Path) -> StoredFile:
    import filetype
    from megatron.energon.media.extractor import MediaFilterConfig
    from megatron.energon.media.metadata import serialize_media_metadata

    extension = filetype.guess_extension(data)
    if extension is None:  # it can be decoded all the same, and its name is of no consequence
        named = path.suffix[1:].lower()
        extension = named if named.isalnum() and len(named) <= _LONGEST else "video"
    filters = MediaFilterConfig.parse(None, False, True)
    told = filters.extract_metadata(data, filename=f"0.{extension}")
    return StoredFile(extension, None if told is None else serialize_media_metadata(told)[1])


def _compact(value: dict) -> str:
    return json.dumps(value, separators=(",", ":"))  # as energon writes it
