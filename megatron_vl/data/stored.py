"""The types of a prepared sample's JSON, which another program may have written."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_vl.data.conversation import MEDIA_KINDS, ROLES, StoredMedia, Turn, from_json
from megatron_vl.typed import Name, Shape, Text, typed

_MAX_PIXELS = 2**28  # of an image or frame, more than PIL decodes
_Side = Annotated[int, Field(ge=1, le=_MAX_PIXELS)]


class _Piece(Shape):
    type: Name
    text: Text = ""


class _Message(Shape):
    role: Literal[ROLES]
    content: list[_Piece]


class _Media(Shape):
    kind: Literal[MEDIA_KINDS]
    files: Annotated[list[Name], Field(min_length=1)]
    height: _Side
    width: _Side
    num_frames: Annotated[int, Field(ge=1, le=10**7)] = 1
    fps: Annotated[float, Field(gt=0, le=10**6)] | None = None
    separate: bool = False

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


def read_stored(value: object) -> tuple[tuple[Turn, ...], tuple[StoredMedia, ...]]:
    """A prepared sample, of its parsed JSON.

    Raises:
        ValueError: it is none; the first fault, by its key.
    """
    typed(_Sample, value)
    return from_json(value)
