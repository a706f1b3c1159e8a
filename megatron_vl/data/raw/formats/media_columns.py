"""An entry's images and videos, from its columns to their places in the turns."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from urllib.parse import unquote

from megatron_vl.data.conversation import (
    BadEntry,
    Conversation,
    MediaSource,
    Turn,
    check_conversation,
)
from megatron_vl.data.grounding import check_boxes
from megatron_vl.data.media_keys import VIDEO_KEYS, rate, settings_of
from megatron_vl.data.raw.formats.fields import Fields
from megatron_vl.data.raw.formats.marks import put_first, settle_marks
from megatron_vl.data.raw.formats.objects import place_objects
from megatron_vl.data.raw.formats.tools import join_calls, read_tools
from megatron_vl.data.raw.formats.turns import column, describe, with_system
from megatron_vl.data.raw.formats.unserved import refuse_unserved
from megatron_vl.models.media import IMAGE, MEDIA_KINDS, PIXEL_KEYS, VIDEO

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def listed_media(entry: dict, fields: Fields) -> dict[str, list[MediaSource]]:
    """Kind -> the entry's images or videos, of its `images` or `image`, `videos` or `video`.

    A column holds one or a list of them, or nothing: null, or a list of null and "".

    Raises:
        BadEntry: something that is no image or video.
    """
    return {
        kind: [] if all(map(_is_nothing, values)) else [media_source(one, kind) for one in values]
        for kind, values in _columns(entry, fields)
    }


def _columns(entry: dict, fields: Fields) -> Iterator[tuple[str, list]]:
    """Each kind, and what an entry lists of it."""
    for kind, named in ((IMAGE, fields.images), (VIDEO, fields.videos)):
        value = column(entry, named, f"{kind}s", kind)
        yield kind, value if isinstance(value, list) else [] if value is None else [value]


def _check_given(turns: Sequence[Turn], entry: dict, fields: Fields) -> None:
    """Raises BadEntry: the text has a mark for what an entry lists, which is nothing."""
    for kind, values in _columns(entry, fields):
        if values and all(map(_is_nothing, values)) and any(
            f"<{kind}>" in part.text for turn in turns for part in turn.parts if part.text
        ):
            raise BadEntry(
                "missing media",
                f"the text has <{kind}>, but its list of {kind}s holds only {values[0]!r}",
            )


def _is_nothing(value) -> bool:
    """Whether a medium is not there: null, "", or a table's row that holds nothing else."""
    values = value.values() if isinstance(value, dict) else [value]
    return all(one is None or one in ("", b"") for one in values)


def media_source(value, kind: str) -> MediaSource:
    """One image or video.

    It is a path, a `file://` or `data:` URL, the file's bytes, or `{"bytes", "path"}` as Hugging
    Face writes media to tables, with qwen-vl-utils' keys beside. A video may also be the list of
    its frames.

    Raises:
        BadEntry: it is none of these, on the network, or asked for in a way that is not served.
    """
    if isinstance(value, dict):
        own = [value.get(name) for name in ("bytes", "path", kind)]
        return with_settings(_source(next(filter(None, own), None), kind), value)
    return _source(value, kind)


def _source(value, kind: str) -> MediaSource:
    if isinstance(value, (bytes, bytearray)) and value:
        return MediaSource(kind=kind, data=(bytes(value),))
    if isinstance(value, str):
        return _named(value, kind)
    if kind == VIDEO and isinstance(value, (list, tuple)) and value:
        return _frames([media_source(frame, IMAGE) for frame in value])
    raise BadEntry("wrong shape", f"one of its {kind}s is {describe(value)}, not a path")


def with_settings(source: MediaSource, keys: dict) -> MediaSource:
    """The image or video as `keys` beside it ask for it.

    Of a list of frames `fps`, or `sample_fps`, is the rate they have.

    Raises:
        BadEntry: values that are none, or exclude one another.
    """
    names = (*PIXEL_KEYS, *(VIDEO_KEYS if source.kind == VIDEO else ()))
    separate = source.frames is not None or (source.kind == VIDEO and len(source.data or ()) > 1)
    if separate:
        names = tuple(name for name in names if name != "fps")
        told = (keys.get("fps"), keys.get("sample_fps"))
        fps = next((one for one in told if one is not None), None)
        if fps is not None:
            source = replace(source, fps=rate(fps))
            if source.fps is None:
                raise BadEntry("wrong shape", "the fps of one of its videos is no rate")
    before = source.settings.to_dict() if source.settings else {}
    given = {name: keys.get(name) for name in names}
    given = before | {name: value for name, value in given.items() if value is not None}
    try:
        return replace(source, settings=settings_of(given, tuple(given)))
    except ValueError as error:
        raise BadEntry(
            "wrong shape", f"one of its {source.kind}s cannot be as it asks: {error}"
        ) from error


def _frames(frames: Sequence[MediaSource]) -> MediaSource:
    if any(frame.settings for frame in frames):
        raise BadEntry(
            "wrong shape", "frames of one of its videos ask for sizes of their own; write them "
                           "beside the list, for the video"
        )
    if all(frame.data for frame in frames):
        return MediaSource(kind=VIDEO, data=tuple(frame.data[0] for frame in frames))
    if all(frame.path for frame in frames):
        return MediaSource(kind=VIDEO, frames=tuple(frame.path for frame in frames))
    raise BadEntry("wrong shape", "the frames of one of its videos are partly paths, partly data")


def _named(name: str, kind: str) -> MediaSource:
    if name.startswith("data:"):
        return MediaSource(kind=kind, data=(_inline(name, kind),))
    if name.startswith("file://"):
        name = unquote(name.removeprefix("file://").removeprefix("localhost"))
    elif _URL.match(name):
        raise BadEntry(
            "missing media",
            f"its {kind} {describe(name)} is on the network; download it and name the file",
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadEntry(
            "bad text", f"the path {describe(name)} of its {kind} cannot be written in UTF-8"
        ) from error
    if not name.strip() or "\0" in name:
        raise BadEntry("missing media", f"its {kind} {describe(name)} is no path")
    return MediaSource(kind=kind, path=name)


def _inline(url: str, kind: str) -> bytes:
    """The bytes in a `data:` URL."""
    head, _, text = url.partition(",")
    if not head.endswith(";base64"):
        raise BadEntry("unusable media", f"the data: URL of its {kind} is not in base64")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise BadEntry("unusable media", f"the base64 of its {kind} is broken ({error})") from error
    if not data:
        raise BadEntry("unusable media", f"the data: URL of its {kind} is empty")
    return data


def place_media(
    turns: Iterable[Turn], waiting: dict[str, list[MediaSource]]
) -> tuple[MediaSource, ...]:
    """The media of each kind, one after another, in the order of their places in the turns.

    Those for which there is no place come last: `check_conversation` counts them.
    """
    queues = {kind: iter(waiting.get(kind, ())) for kind in MEDIA_KINDS}
    places = [kind for turn in turns for kind in turn.media]
    media = [next(queues[kind], None) for kind in places]
    media += [source for queue in queues.values() for source in queue]
    return tuple(source for source in media if source is not None)


def conversation(
    turns: Sequence[Turn], media: Sequence[MediaSource], entry: dict, fields: Fields, *,
    marks_as_text: int = 0,
) -> Conversation:
    """The checked conversation of `turns` and the media in them, each kind in order, after the
    entry's system prompt.

    Args:
        entry: what stands beside the turns: objects in the images, functions to call.
        marks_as_text: marks that are text already.

    Raises:
        BadEntry: see `check_conversation`; or it is not to be trained on as it would be.
    """
    refuse_unserved(entry, fields)
    waiting = {kind: [one for one in media if one.kind == kind] for kind in MEDIA_KINDS}
    counts = {kind: len(of_kind) for kind, of_kind in waiting.items()}
    turns, as_text = settle_marks(turns, counts)
    _check_given(turns, entry, fields)
    turns, unmarked = put_first(turns, counts)
    media = place_media(turns, waiting)
    own = len(turns)
    turns = place_objects(with_system(turns, entry, fields), media, entry)
    first = 1 + own - len(turns)  # messages number turns as the entry does
    turns = join_calls(turns, first)
    check_boxes(turns)
    made = Conversation(
        turns=turns, media=media, tools=read_tools(entry, fields), unmarked=unmarked,
        marks_as_text=marks_as_text + as_text,
    )
    check_conversation(made, first)
    return made
