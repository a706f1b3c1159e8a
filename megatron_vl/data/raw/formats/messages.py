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

Where `type` is left out, the key tells it. `fps` beside a list of frames is their rate; what
else qwen-vl-utils reads beside a medium, such as `max_pixels`, is read: see `MediaSettings`.
Content that is text has no marks in it, unless the entry has `images` or `videos`: then `<image>`
and `<video>` are their places. Roles are system (or developer), user, assistant, and those of tools
that `tools` says; `http://` URLs are refused: download first.
"""

from __future__ import annotations

from collections import Counter

from megatron_vl.data.conversation import BadEntry, Conversation, MediaSource, Part, Turn
from megatron_vl.data.raw.formats.dialogue import make_turn
from megatron_vl.data.raw.formats.fields import Fields
from megatron_vl.data.raw.formats.marks import settle_marks
from megatron_vl.data.raw.formats.media_columns import (
    conversation,
    listed_media,
    media_source,
    place_media,
    with_settings,
)
from megatron_vl.data.raw.formats.tools import calls_of
from megatron_vl.data.raw.formats.tracked import call_keys
from megatron_vl.data.raw.formats.turns import (
    CALL,
    MARK,
    describe,
    listed_turns,
    read_role,
    role_names,
    split_at_marks,
)
from megatron_vl.models.media import MEDIA_KINDS

_TYPES = ("text", *(f"{kind}{end}" for kind in MEDIA_KINDS for end in ("", "_url")))


def read(entry: dict, fields: Fields) -> Conversation:
    """The conversation of one entry.

    Raises:
        BadEntry: it is not of this format, or cannot be trained on.
    """
    roles = {"developer": "system", **role_names(fields)}
    waiting = listed_media(entry, fields)
    turns: list[Turn] = []
    named: list[MediaSource | dict] = []  # of the pieces that are media; a piece: a column has it
    for number, said in enumerate(listed_turns(entry, fields, "messages", "conversations"), 1):
        role, key = read_role(said, number, fields, roles)
        content = said.get(key)
        if isinstance(content, str):
            parts = split_at_marks(content, MARK)
        elif isinstance(content, list) and content:
            call_keys(content, "piece key")
            pieces = [_piece(piece, number) for piece in content]
            parts = tuple(part for part, _ in pieces)
            named += [source for part, source in pieces if part.media and role != CALL]
            if role == CALL and all(part.text is not None for part in parts):
                content = "".join(part.text for part in parts)  # else the list is of calls
        elif not content and calls_of(said, number):
            content, parts = "", ()
        else:
            raise BadEntry("wrong shape", f"turn {number} has no text or list `{key}`")
        turns.append(make_turn(said, role, number, content, parts))
    own = Counter(source.kind for source in named if isinstance(source, MediaSource))
    given = {kind: len(waiting[kind]) + own[kind] for kind in MEDIA_KINDS}
    from_columns = any(waiting.values())  # else content that is text has no marks
    settled, as_text = settle_marks(turns, given if from_columns else {})
    return conversation(
        settled, _fill(settled, named, waiting), entry, fields,
        marks_as_text=as_text if from_columns or not named else 0,
    )


def _piece(piece, number: int) -> tuple[Part, MediaSource | dict]:
    """One piece of a content list; and its image or video, or itself where it names none."""
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
        return Part(text=piece["text"]), piece
    kind = found.removesuffix("_url")
    value = next((piece[name] for name in (found, "url", "path") if piece.get(name)), None)
    if isinstance(value, dict) and value.get("url"):
        value = value["url"]
    if value is None:
        if found != kind:
            raise BadEntry("missing media", f"turn {number} has an {found} without a URL")
        return Part(media=kind), piece
    return Part(media=kind), with_settings(media_source(value, kind), piece)


def _fill(
    turns: tuple[Turn, ...],
    named: list[MediaSource | dict],
    waiting: dict[str, list[MediaSource]],
) -> tuple[MediaSource, ...]:
    """The media in order: those the content names, and in the other places those of the columns."""
    places = [part for turn in turns for part in turn.parts if part.media]
    own: dict[str, list[MediaSource]] = {kind: [] for kind in MEDIA_KINDS}
    queues = {kind: iter(waiting[kind]) for kind in MEDIA_KINDS}
    pieces = iter(named)
    for part in places:
        source = next(pieces) if part.mark is None else {}
        if isinstance(source, dict):
            beside, source = source, next(queues[part.media], None)
            source = source and with_settings(source, beside)
        if source is not None:
            own[part.media].append(source)
    for kind, queue in queues.items():
        own[kind] += queue
    return place_media(turns, own)
