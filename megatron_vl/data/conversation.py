"""What every raw format becomes: turns of text and media, and where the media are. Pure Python."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from megatron_vl.errors import shortened

IMAGE, VIDEO = "image", "video"
MEDIA_KINDS = (IMAGE, VIDEO)
ROLES = ("system", "user", "assistant")
REASONS = (  # why an entry or a sample is left out
    "wrong shape", "bad text", "reserved mark", "unknown role", "mark count", "empty answer",
    "no answer", "bad box", "missing media", "unusable media", "too long", "too many patches",
    "chat template",
)  # fmt: skip
# A tokenizer takes these for images and videos wherever they stand.
_RESERVED = re.compile(r"<\|(?:vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")


class BadEntry(ValueError):
    """An entry or sample that cannot be used: its `reason` is one of a few words, its message says
    what is wrong.

    The caller says which one it is. Reasons are counted, so they name a kind of fault and no
    value: see REASONS.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(shortened(message))
        assert reason in REASONS, reason
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A stretch of one turn: text, or the place of one image or video."""

    text: str | None = None
    media: str | None = None  # "image" or "video"
    # How a place is written in its text, where it is a mark there.
    mark: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert (self.text is None) == (self.media in MEDIA_KINDS), self


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str  # one of ROLES
    parts: tuple[Part, ...]

    @property
    def media(self) -> tuple[str, ...]:
        """Kinds of the images and videos in it, in order."""
        return tuple(part.media for part in self.parts if part.media)

    def message(self) -> dict:
        """The turn as a chat template takes it."""
        content = [
            {"type": part.media} if part.media else {"type": "text", "text": part.text}
            for part in self.parts
        ]
        return {"role": self.role, "content": content}

    @classmethod
    def from_message(cls, message: dict) -> Turn:
        """The inverse of `message`."""
        return cls(
            role=message["role"],
            parts=tuple(
                Part(text=piece["text"]) if piece["type"] == "text" else Part(media=piece["type"])
                for piece in message["content"]
            ),
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

    def __post_init__(self) -> None:
        given = [x for x in (self.path, self.frames, self.data) if x is not None]
        assert self.kind in MEDIA_KINDS and len(given) == 1, self


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One entry of any raw format."""

    turns: tuple[Turn, ...]
    media: tuple[MediaSource, ...] = ()  # in the order of their places in the turns
    unmarked: int = 0  # of the media: those without a mark, put before the first user turn
    marks_as_text: int = 0  # marks for which there are no media


def check_conversation(conversation: Conversation) -> None:
    """What every format asks of an entry.

    Raises:
        BadEntry: no turn, a system turn that is not the first, no answer at the end, an answer
            without text, a mark of the tokenizer in the text, text that UTF-8 cannot write, or
            media unlike the places for them.
    """
    turns = conversation.turns
    if not turns:
        raise BadEntry("wrong shape", "it has no turn")
    for number, turn in enumerate(turns, start=1):
        if turn.role not in ROLES:
            raise BadEntry("unknown role", f"turn {number} is from {turn.role!r}")
        if turn.role == "system" and number > 1:
            raise BadEntry("unknown role", f"turn {number} is a system turn, but not the first")
        if turn.role == "assistant" and not any(p.text and p.text.strip() for p in turn.parts):
            raise BadEntry("empty answer", f"the answer in turn {number} is empty")
        for part in turn.parts:
            if part.text is not None:
                _check_text(part.text, number)
    if turns[-1].role != "assistant":
        raise BadEntry("no answer", f"it ends with a turn of the {turns[-1].role}, not an answer")
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


def _check_text(text: str, number: int) -> None:
    reserved = _RESERVED.search(text)
    if reserved is not None:
        raise BadEntry("reserved mark", f"turn {number} holds the reserved mark {reserved[0]}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadEntry(
            "bad text",
            f"its text holds half a character (\\u{ord(error.object[error.start]):x}), which UTF-8 "
            f"cannot write",
        ) from error


# ---- in a shard ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMedia:
    """One image or video of a prepared sample: its files in the shard, and its sizes.

    With the sizes here, rows are packed before a single media byte is read.
    """

    kind: str  # "image" or "video"
    files: tuple[str, ...]  # extensions of the sample's entries: "0.jpg", or a video's "1.0000.jpg"
    height: int  # pixels, upright
    width: int
    num_frames: int = 1
    fps: float | None = None  # frames a second of a video; None for images
    separate: bool = False  # a video whose frames are images, one a file


_OF_VIDEOS = ("num_frames", "fps", "separate")


def to_json(turns: tuple[Turn, ...], media: tuple[StoredMedia, ...]) -> bytes:
    """A prepared sample's `KEY.json`."""
    stored = [
        {name: getattr(m, name) for name in ("kind", "files", "height", "width")}
        | ({name: getattr(m, name) for name in _OF_VIDEOS} if m.kind == VIDEO else {})
        for m in media
    ]
    value = {"messages": [turn.message() for turn in turns], "media": stored}
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def from_json(value: dict) -> tuple[tuple[Turn, ...], tuple[StoredMedia, ...]]:
    """The inverse of `to_json`, of its parsed JSON.

    Raises:
        ValueError: it is no such JSON.
    """
    try:
        turns = tuple(Turn.from_message(message) for message in value["messages"])
        media = tuple(
            StoredMedia(**{**stored, "files": tuple(stored["files"])}) for stored in value["media"]
        )
    except (KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"it is no conversation that `prepare` wrote ({error!r})") from error
    return turns, media
