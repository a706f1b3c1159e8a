"""What every raw format becomes: turns of text and media, and where the media are. Pure Python."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from megatron_vl.errors import printable, shortened
from megatron_vl.models.media import MEDIA_KINDS, VIDEO, MediaSettings, StoredMedia

ROLES = ("system", "user", "assistant", "tool")
REASONS = (  # why an entry or a sample is left out
    "wrong shape", "bad text", "reserved mark", "unknown role", "mark count", "empty answer",
    "no answer", "bad box", "missing media", "unusable media", "too long", "too many patches",
    "chat template", "not served",
)  # fmt: skip
# Qwen's tokenizers take these for images and videos, or for the bounds of turns, wherever they
# stand. Preparing keeps to them: it is done for no family.
_RESERVED = re.compile(
    r"<\|(?:vision_start|vision_end|vision_pad|image_pad|video_pad|im_start|im_end|endoftext)\|>"
)


class BadEntry(ValueError):
    """An entry or sample that cannot be used: its `reason` is one of a few words, its message says
    what is wrong.

    The caller says which one it is. Reasons are counted, so they name a kind of fault and no
    value: see REASONS.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(shortened(printable(message)))
        assert reason in REASONS, reason
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A place in an image: a point, a box (two corners) or a quadrangle (four), as numbers.

    How a family writes it is decided when a sample is encoded: see `megatron_vl.data.grounding`.
    """

    points: tuple[tuple[float, float], ...]  # (x, y) from the upper left
    size: tuple[float, float] | None = None  # they are measured in; None: pixels, not yet known
    image: int | None = None  # which of the entry's media it is in; None: the entry does not say

    def __post_init__(self) -> None:
        assert len(self.points) in (1, 2, 4), self
        assert self.size is not None or self.image is not None, self


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A stretch of one turn: text, the place of one image or video, or an object in an image."""

    text: str | None = None
    media: str | None = None  # "image" or "video"
    ref: str | None = None  # what an object is called
    box: Box | None = None
    # How a place is written in its text, where it is a mark there.
    mark: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        given = [x for x in (self.text, self.media, self.ref, self.box) if x is not None]
        assert len(given) == 1 and self.media in (None, *MEDIA_KINDS), self

    @property
    def says(self) -> bool:
        """Whether it is more than blanks or the place of an image or video."""
        return self.box is not None or bool((self.text or self.ref or "").strip())

    def piece(self) -> dict:
        """As a chat template takes it, if it is text or media; and as it is stored."""
        if self.media is not None:
            return {"type": self.media}
        if self.ref is not None:
            return {"type": "ref", "ref": self.ref}
        if self.box is not None:
            where = {} if self.box.image is None else {"image": self.box.image}
            return {"type": "box", "points": self.box.points, "size": self.box.size, **where}
        return {"type": "text", "text": self.text}

    @classmethod
    def from_piece(cls, piece: dict) -> Part:
        """The inverse of `piece`."""
        kind = piece["type"]
        if kind == "box":
            points = tuple((float(x), float(y)) for x, y in piece["points"])
            width, height = piece["size"]
            return cls(box=Box(points=points, size=(width, height), image=piece.get("image")))
        return cls(**{kind: piece[kind]}) if kind in ("text", "ref") else cls(media=kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call of a function."""

    name: str
    arguments: str  # a JSON object
    id: str | None = None

    def to_dict(self) -> dict:
        """As a chat template takes it."""
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        named = {} if self.id is None else {"id": self.id}
        return {"type": "function", **named, "function": function}

    @classmethod
    def from_dict(cls, call: dict) -> Call:
        """The inverse of `to_dict`."""
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return cls(name=call["function"]["name"], arguments=arguments, id=call.get("id"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str  # one of ROLES
    parts: tuple[Part, ...]
    trained: bool = True  # False: an answer that is shown and not trained
    calls: tuple[Call, ...] = ()  # of functions, after what the answer says
    call_id: str | None = None  # the call that a tool answers

    @property
    def media(self) -> tuple[str, ...]:
        """Kinds of the images and videos in it, in order."""
        return tuple(part.media for part in self.parts if part.media)

    @property
    def says(self) -> bool:
        """Whether it is an answer that can be trained: it says or calls something."""
        return bool(self.calls) or any(part.says for part in self.parts)

    @property
    def of_tools(self) -> bool:
        return bool(self.calls) or self.role == "tool"

    def message(self, *, plain: bool = False) -> dict:
        """The turn as a chat template takes it.

        Args:
            plain: text is a string: all that templates of models without media take, and some take
                of tools.
        """
        content: list | str = [part.piece() for part in self.parts]
        if (plain or self.of_tools) and all(part.text is not None for part in self.parts):
            content = "".join(part.text for part in self.parts)
        message = {"role": self.role, "content": content}
        if self.calls:
            message["tool_calls"] = [call.to_dict() for call in self.calls]
        if self.call_id is not None:
            message["tool_call_id"] = self.call_id
        return message

    def stored(self) -> dict:
        """The message as a shard has it."""
        return self.message() | ({} if self.trained else {"trained": False})

    @classmethod
    def from_stored(cls, message: dict) -> Turn:
        """The inverse of `stored`."""
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}] if content else []
        return cls(
            role=message["role"],
            parts=tuple(map(Part.from_piece, content)),
            trained=message.get("trained", True),
            calls=tuple(map(Call.from_dict, message.get("tool_calls", ()))),
            call_id=message.get("tool_call_id"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaSource:
    """Where one image or video of an entry is: in files, or in the entry itself.

    A video is one file, or its frames in order: a directory of images (`path` names it), or a list
    of them.
    """

    kind: str  # "image" or "video"
    path: str | None = None  # as the entry names it
    frames: tuple[str, ...] | None = None  # a video's frames, as the entry names them
    data: tuple[bytes, ...] | None = None  # the files' own bytes, one or a video's frames
    fps: float | None = None  # of frames, where the entry says it
    settings: MediaSettings | None = None  # what the entry asks for it

    def __post_init__(self) -> None:
        given = [x for x in (self.path, self.frames, self.data) if x is not None]
        assert self.kind in MEDIA_KINDS and len(given) == 1, self


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One entry of any raw format."""

    turns: tuple[Turn, ...]
    media: tuple[MediaSource, ...] = ()  # in the order of their places in the turns
    tools: str = ""  # a JSON list of the functions that may be called
    unread: tuple[str, ...] = ()  # keys of the entry that say nothing here, such as "turn key 'x'"
    unmarked: int = 0  # of the media: those without a mark, put before the first user turn
    marks_as_text: int = 0  # marks for which there are no media


def check_conversation(conversation: Conversation, first: int = 1) -> None:
    """What every format asks of an entry.

    Args:
        first: the number of the first turn; 0: it is the entry's system prompt.

    Raises:
        BadEntry: no turn, a system turn that is not the first, no answer at the end, an answer
            without text, none that is to be trained, a mark of the tokenizer in the text, text
            that UTF-8 cannot write, or media unlike the places for them.
    """
    turns = conversation.turns
    if not turns:
        raise BadEntry("wrong shape", "it has no turn")
    for number, turn in enumerate(turns, start=first):
        if turn.role not in ROLES:
            raise BadEntry("unknown role", f"turn {number} is from {turn.role!r}")
        if turn.role == "system" and number > first:
            raise BadEntry("unknown role", f"turn {number} is a system turn, but not the first")
        if turn.role == "assistant" and not turn.says:
            raise BadEntry("empty answer", f"the answer in turn {number} is empty")
        for part in turn.parts:
            if part.text or part.ref:
                where = f"turn {number}" if number else "its system prompt"
                _check_text(part.text or part.ref, where)
        if turn.of_tools:
            called = (text for c in turn.calls for text in (c.name, c.arguments, c.id or ""))
            for text in (turn.call_id or "", *called):
                _check_text(text, f"turn {number}")
    if conversation.tools:
        _check_text(conversation.tools, "its `tools`")
    if turns[-1].role != "assistant":
        raise BadEntry("no answer", f"it ends with a turn of the {turns[-1].role}, not an answer")
    if not any(turn.trained for turn in turns if turn.role == "assistant"):
        raise BadEntry("no answer", "none of its answers is to be trained (loss false, weight 0)")
    places = [kind for turn in turns for kind in turn.media]
    for kind in MEDIA_KINDS:
        marks, given = places.count(kind), sum(m.kind == kind for m in conversation.media)
        if marks != given:
            raise BadEntry(
                "mark count",
                f"it has {marks} {kind} marks for {given} {kind}s; write <{kind}> once for each "
                f"{kind}, and otherwise where text is meant, such as [{kind}]",
            )
    if places != [m.kind for m in conversation.media]:
        raise BadEntry("mark count", "its images and videos are not in the order of their marks")


def _check_text(text: str, where: str) -> None:
    """Raises BadEntry: text that a shard cannot hold, or a mark of the tokenizer; `where` it is."""
    reserved = _RESERVED.search(text)
    if reserved is not None:
        raise BadEntry("reserved mark", f"{where} holds the reserved mark {reserved[0]}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadEntry(
            "bad text",
            f"{where} holds half a character (\\u{ord(error.object[error.start]):x}), which UTF-8 "
            f"cannot write",
        ) from error


# ---- in a shard ----------------------------------------------------------------------------------


_OF_VIDEOS = ("num_frames", "fps", "separate")


def to_json(turns: tuple[Turn, ...], media: tuple[StoredMedia, ...], tools: str = "") -> bytes:
    """A prepared sample's `KEY.json`. `tools`: see `Conversation`."""
    stored = [
        {name: getattr(m, name) for name in ("kind", "files", "height", "width")}
        | ({name: getattr(m, name) for name in _OF_VIDEOS} if m.kind == VIDEO else {})
        | ({"settings": m.settings.to_dict()} if m.settings is not None else {})
        | ({"path": m.path} if m.path is not None else {})
        for m in media
    ]
    value = {"messages": [turn.stored() for turn in turns], "media": stored}
    if tools:
        value["tools"] = json.loads(tools)
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def from_json(value: dict) -> tuple[tuple[Turn, ...], tuple[StoredMedia, ...], str]:
    """The inverse of `to_json`, of its parsed JSON: turns, media and tools.

    Raises:
        ValueError: it is no such JSON.
    """
    try:
        turns = tuple(Turn.from_stored(message) for message in value["messages"])
        media = tuple(map(_stored_media, value["media"]))
        tools = value.get("tools")
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"it is no conversation that `prepare` wrote ({error!r})") from error
    return turns, media, json.dumps(tools, ensure_ascii=False) if tools else ""


def _stored_media(stored: dict) -> StoredMedia:
    settings = stored.get("settings")
    return StoredMedia(**stored | {
        "files": tuple(stored["files"]),
        "settings": None if settings is None else MediaSettings(**settings),
    })
