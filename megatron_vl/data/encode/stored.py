"""The types of a prepared sample's JSON, which another program may have written."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megatron_vl.data.conversation import ROLES, Turn, from_json
from megatron_vl.models.media import MAX_FPS, MEDIA_KINDS, StoredMedia
from megatron_vl.typed import Name, Shape, Text, typed

_MAX_PIXELS = 2**28  # of an image or frame, more than PIL decodes
_PIECES = ("text", "ref", "box", *MEDIA_KINDS)
_Side = Annotated[int, Field(ge=1, le=_MAX_PIXELS)]
_Pair = Field(min_length=2, max_length=2)
_Point = Annotated[list[Annotated[float, Field(ge=-1e9, le=1e9)]], _Pair]


def _written(value: Any) -> Any:
    json.dumps(value, ensure_ascii=False).encode()
    return value


_Table = Annotated[dict, AfterValidator(_written)]  # of JSON that goes to the chat template


class _Piece(Shape):
    type: Literal[_PIECES]
    text: Text | None = None
    ref: Text | None = None
    points: Annotated[list[_Point], Field(min_length=1, max_length=4)] | None = None
    size: Annotated[list[Annotated[float, Field(ge=1e-6, le=1e9)]], _Pair] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> _Piece:
        needed = {"text": ("text",), "ref": ("ref",), "box": ("points", "size")}
        for name in needed.get(self.type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"it has no {name}")
        return self


def _pieces(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class _Function(Shape):
    name: Text
    arguments: _Table


class _Call(Shape):
    function: _Function
    id: Text | None = None


class _Message(Shape):
    role: Literal[ROLES]
    content: Annotated[list[_Piece], BeforeValidator(_pieces)]
    trained: bool = True
    tool_calls: list[_Call] = Field(default_factory=list)
    tool_call_id: Text | None = None


class _Media(Shape):
    kind: Literal[MEDIA_KINDS]
    files: Annotated[list[Name], Field(min_length=1)]
    height: _Side
    width: _Side
    num_frames: Annotated[int, Field(ge=1, le=10**7)] = 1
    fps: Annotated[float, Field(gt=0, le=MAX_FPS)] | None = None
    separate: bool = False
    settings: dict | None = None  # MediaSettings looks at them
    path: Text | None = None

    @model_validator(mode="after")
    def _fits(self) -> _Media:
        if self.height * self.width > _MAX_PIXELS:
            raise ValueError(f"it has over {_MAX_PIXELS:,} pixels")
        if len(self.files) != (self.num_frames if self.separate else 1):
            raise ValueError(f"it has {len(self.files)} files for {self.num_frames} frame(s)")
        return self


class _Sample(Shape):
    messages: list[_Message]
    media: list[_Media]
    tools: list[_Table] | None = None


def read_stored(value: object) -> tuple[tuple[Turn, ...], tuple[StoredMedia, ...], str]:
    """A prepared sample, of its parsed JSON: turns, media and tools.

    Raises:
        ValueError: it is none; the first fault, by its key.
    """
    typed(_Sample, value)
    return from_json(value)
