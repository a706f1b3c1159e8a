"""ChatML WebDataset shards, and the JSON they are made from.

A sample of a shard has three parts (field map `imgs: jpgs, videos: videos, conversation: json`):

| part | |
|---|---|
| `jpgs` | pickled list of the images' bytes, or of their paths |
| `videos` | pickled list of the videos, each the list of its frames' bytes or paths |
| `json` | the turns, or `{"conversations": turns, "second_per_grid_ts": [seconds a frame, ...]}` |

An entry of the JSON is as in ShareGPT's format; a video `a/b.mp4` of its `videos` stands for the
frames in the folder `a/b`, `a/b.json` beside it being `{"fps": frames a second}` (2 without it).
The path stays as the entry has it; who opens the files finds the folder.

Turns have `from` and `value`, or `role` and `content`; `system` beside them is the system prompt
where no turn is. `<image>` and `<video>` are the places of
the media. Line breaks and blanks at the ends of what a user says, and around the marks in it, go,
as they do where these shards are read for Qwen2-VL.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_vl.data.conversation import BadEntry, Conversation, MediaSource, Part, Turn
from megatron_vl.data.media_keys import rate
from megatron_vl.data.raw.formats.dialogue import read_turns
from megatron_vl.data.raw.formats.fields import Fields
from megatron_vl.data.raw.formats.media_columns import (
    conversation,
    listed_media,
    media_source,
    place_media,
)
from megatron_vl.data.raw.formats.pickled import read_pickled_list
from megatron_vl.data.raw.formats.tracked import track_like
from megatron_vl.data.raw.formats.turns import MARK, listed_turns
from megatron_vl.inputs import json_value
from megatron_vl.models.media import IMAGE, VIDEO

SHARD_PARTS = ("jpgs", "videos", "json")  # of a sample of a shard
_SECONDS_A_FRAME = 0.5  # where the sample does not say


def read(entry: dict, fields: Fields) -> Conversation:
    """The conversation of a shard's sample (`{"json": bytes, ...}`), or of an entry of the JSON.

    Raises:
        BadEntry: it is not of this format, or cannot be trained on.
    """
    if isinstance(entry.get("json"), bytes):
        entry, said, waiting = _sample(entry, fields)
    else:
        said = listed_turns(entry, fields, "conversations", "messages")
        waiting = listed_media(entry, fields)
    turns = read_turns(said, fields, MARK)
    made = conversation(turns, place_media(turns, waiting), entry, fields)
    return replace(made, turns=tuple(map(_without_margins, made.turns)))


def _sample(
    entry: dict, fields: Fields
) -> tuple[dict, list, dict[str, list[MediaSource]]]:
    """What stands beside the turns, the turns as written, and the media of a shard's sample."""
    try:
        said = json_value(entry["json"])
    except UnicodeDecodeError as error:
        raise BadEntry("bad text", "its `json` is not UTF-8; save it as UTF-8") from error
    except ValueError as error:
        raise BadEntry("wrong shape", f"its `json` is not valid JSON ({error})") from error
    seconds, beside = None, {}
    if isinstance(said, dict):
        beside = said = track_like(entry, said, "entry key")
        seconds = said.get("second_per_grid_ts")
        said = listed_turns(said, fields, "conversations", "messages")
    if not isinstance(said, list):
        raise BadEntry("wrong shape", "its `json` is no list of turns")
    said = track_like(entry, said, "turn key")
    images = [media_source(image, IMAGE) for image in read_pickled_list(entry, "jpgs")]
    videos = [media_source(video, VIDEO) for video in read_pickled_list(entry, "videos")]
    if seconds is None or seconds == []:
        seconds = [_SECONDS_A_FRAME] * len(videos)
    if not isinstance(seconds, list) or len(seconds) != len(videos):
        raise BadEntry("wrong shape", "its second_per_grid_ts is not one number a video")
    return beside, said, {IMAGE: images, VIDEO: list(map(_timed, videos, seconds))}


def _timed(video: MediaSource, seconds) -> MediaSource:
    """A video of frames so many seconds apart; a file's own rate is in the file."""
    value = rate(seconds)
    fps = rate(1 / value) if value else None
    if fps is None:
        raise BadEntry("wrong shape", "its second_per_grid_ts is no list of numbers above 0")
    return video if video.path is not None else replace(video, fps=fps)


def _without_margins(turn: Turn) -> Turn:
    if turn.role != "user":
        return turn
    parts = []
    for before, part, after in zip(
        (None, *turn.parts), turn.parts, (*turn.parts[1:], None), strict=False
    ):
        text = part.text
        if text is not None:  # what stands beside an object stays
            text = text.lstrip() if before is None or before.media else text
            text = text.rstrip() if after is None or after.media else text
            part = Part(text=text)
        parts.append(part)
    return replace(turn, parts=tuple(p for p in parts if p.text != "") or tuple(parts[:1]))
