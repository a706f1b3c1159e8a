"""A person's images and videos as a prepared sample has them, by the code that prepares one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_vl.data.raw.media import RawMedia, measure
from megatron_vl.data.raw.shards import Entry, store
from megatron_vl.models.media import BadMedia, MediaSettings, StoredMedia

Read = Callable[[str], bytes]  # the bytes of a file by its name in `StoredMedia.files`


def stored_media(
    media: Sequence[RawMedia], settings: Sequence[MediaSettings | None] = (),
    paths: Sequence[str | None] = (),
) -> tuple[tuple[StoredMedia, ...], Read]:
    """Images and videos with their sizes, and what reads their files.

    Args:
        settings: what is asked for each of `media`; empty: nothing.
        paths: as an entry names each; empty: those of the files.

    Raises:
        BadMedia: one cannot be decoded.
    """
    sizes = {}
    for one in media:
        sizes[one] = measure(one)
        if isinstance(sizes[one], str):
            raise BadMedia(f"its {one} is unusable: {sizes[one]}")
    entry = Entry(
        number=0, name=None, turns=(), media=tuple(media), settings=tuple(settings),
        paths=tuple(paths) or tuple(str(one.files[0]) for one in media),
    )
    stored, files = store(entry, sizes)
    paths: dict[str, Path] = {file.extension: file.path for file in files}
    return stored, lambda name: paths[name].read_bytes()
