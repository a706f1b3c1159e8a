"""The OpenAI API's messages, and the like of Hugging Face and Qwen: content is text or a list.

    {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
        {"type": "text", "text": "What is this?"}]}, ...]}

| piece of a content list | |
|---|---|
| `{"type": "text", "text": ...}` | text |
| `{"type": "image_url", "image_url": {"url": ...}}`, `"video_url"` alike | `data:` or `file://` |
| `{"type": "image", "image": ...}`, `"video"` alike | a path, such a URL, or a list of frames |
| `{"type": "image"}`, `"video"` alike | the next of the entry's `images` or `videos` |

Where `type` is left out, the key tells it. `fps` beside a list of frames is their rate; other keys
beside a medium, such as `max_pixels`, are not read: a run's options hold for all its images.
Content that is text has no marks in it, unless the entry has `images` or `videos`: then `<image>`
and `<video>` are their places. Roles are system (or developer), user and assistant; turns of tools
are refused, and so are `http://` URLs: download first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from megatron_vl.data.conversation import (
    MEDIA_KINDS,
    BadEntry,
    Conversation,
    MediaSource,
    Part,
    Turn,
)
from megatron_vl.data.formats.fields import Fields
from megatron_vl.data.formats.marks import settle_marks
from megatron_vl.data.formats.media_columns import (
    conversation,
    listed_media,
    media_source,
    place_media,
    positive,
)
from megatron_vl.data.formats.turns import (
    MARK,
    describe,
    listed_turns,
    read_role,
    role_names,
    split_at_marks,
    with_system,
)

_TYPES = ("text", *(f"{kind}{end}" for kind in MEDIA_KINDS for end in ("", "_url")))


def read(entry: dict, fields: Fields) -> Conversation:
    """The conversation of one entry.

    Raises:
        BadEntry: it is not of this format, or cannot be trained on.
    """
    roles = {"developer": "system", **role_names(fields)}
    waiting = listed_media(entry, fields)
    turns: list[Turn] = []
    named: list[MediaSource | None] = []  # of the pieces that are media; None: a column has it
    for number, said in enumerate(listed_turns(entry, fields, "messages", "conversations"), 1):
        role, key = read_role(said, number, fields, roles)
        content = said.get(key)
        if isinstance(content, str):
            parts = split_at_marks(content, MARK)
        elif isinstance(content, list) and content:
            pieces = [_piece(piece, number) for piece in content]
            parts = tuple(part for part, _ in pieces)
            named += [source for part, source in pieces if part.media]
        else:
            raise BadEntry("wrong shape", f"turn {number} has no text or list `{key}`")
        turns.append(Turn(role=role, parts=parts))
    own = Counter(source.kind for source in named if source is not None)
    given = {kind: len(waiting[kind]) + own[kind] for kind in MEDIA_KINDS}
    from_columns = any(waiting.values())  # else content that is text has no marks
    settled, as_text = settle_marks(turns, given if from_columns else {})
    settled = with_system(settled, entry, fields)
    return conversation(
        settled, _fill(settled, named, waiting),
        marks_as_text=as_text if from_columns or not named else 0,
    )


def _piece(piece, number: int) -> tuple[Part, MediaSource | None]:
    """One piece of a content list, and its image or video where it names one."""
    if not isinstance(piece, dict):
        raise BadEntry("wrong shape", f"turn {number} has {describe(piece)} in its content")
    found = piece.get("type")
    if found is None:
        found = next((name for name in _TYPES if piece.get(name) is not None), None)
    if not isinstance(found, str) or found not in _TYPES:
        raise BadEntry(
            "wrong shape",
            f"turn {number} has content of type {describe(found)}, not one of: {', '.join(_TYPES)}",
        )
    if found == "text":
        if not isinstance(piece.get("text"), str):
            raise BadEntry("wrong shape", f"turn {number} has content without its `text`")
        return Part(text=piece["text"]), None
    kind = found.removesuffix("_url")
    value = next((piece[name] for name in (found, "url", "path") if piece.get(name)), None)
    if isinstance(value, dict) and value.get("url"):
        value = value["url"]
    if value is None:
        if found != kind:
            raise BadEntry("missing media", f"turn {number} has an {found} without a URL")
        return Part(media=kind), None
    source = media_source(value, kind)
    if source.frames is not None and piece.get("fps") is not None:
        fps = positive(piece["fps"])
        if fps is None:
            raise BadEntry("wrong shape", f"the fps of a video in turn {number} is no rate")
        source = replace(source, fps=fps)
    return Part(media=kind), source


def _fill(
    turns: tuple[Turn, ...],
    named: list[MediaSource | None],
    waiting: dict[str, list[MediaSource]],
) -> tuple[MediaSource, ...]:
    """The media in order: those the content names, and in the other places those of the columns."""
    places = [part for turn in turns for part in turn.parts if part.media]
    own: dict[str, list[MediaSource]] = {kind: [] for kind in MEDIA_KINDS}
    queues = {kind: iter(waiting[kind]) for kind in MEDIA_KINDS}
    pieces = iter(named)
    for part in places:
        source = next(pieces) if part.mark is None else None
        source = source if source is not None else next(queues[part.media], None)
        if source is not None:
            own[part.media].append(source)
    for kind, queue in queues.items():
        own[kind] += queue
    return place_media(turns, own)
