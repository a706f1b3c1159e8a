"""Marks in the text against the media of an entry: which mark is a place, and which is text.

| an entry has | |
|---|---|
| a mark for every medium | each is a place |
| no media at all | every mark is text |
| as many marks as media in what the user says, and more elsewhere | the others are text |
| videos, and as many `<image>` as LLaVA-Video writes them | each `<image>` is a video's place |
| media of a kind without any mark | they come before the first user turn, as ms-swift puts them |

Anything else may mean one thing or another, and is left for `check_conversation` to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megatron_vl.data.conversation import Part, Turn
from megatron_vl.models.media import IMAGE, MEDIA_KINDS, VIDEO


def settle_marks(
    turns: Sequence[Turn], given: Mapping[str, int]
) -> tuple[tuple[Turn, ...], int]:
    """The turns with those marks as places that have a medium; and how many of them are text.

    Args:
        given: media of each kind.
    """
    turns = tuple(turns)
    if not any(given.values()):
        return _as_text(turns, lambda turn, part: True)
    asked, others = _marks(turns, IMAGE)
    if not given[IMAGE] and not _places(turns, VIDEO) and given[VIDEO] in (asked, asked + others):
        turns = tuple(
            _of_videos(turn) if turn.role == "user" or given[VIDEO] > asked else turn
            for turn in turns
        )
    count = 0
    for kind in MEDIA_KINDS:
        asked, others = _marks(turns, kind)
        wanted = given[kind] - (_places(turns, kind) - asked - others)
        if asked == wanted and others:
            turns, more = _as_text(
                turns, lambda turn, part, kind=kind: turn.role != "user" and part.media == kind
            )
            count += more
    return turns, count


def put_first(
    turns: Sequence[Turn], given: Mapping[str, int]
) -> tuple[tuple[Turn, ...], int]:
    """The turns with places for media of a kind that has none; and how many these are."""
    turns, count = list(turns), 0
    first = next((at for at, turn in enumerate(turns) if turn.role == "user"), None)
    for kind in MEDIA_KINDS if first is not None else ():
        if given[kind] and not _places(turns, kind):
            places = (Part(media=kind),) * given[kind]
            turns[first] = replace(turns[first], parts=(*places, *turns[first].parts))
            count += given[kind]
    return tuple(turns), count


def _places(turns: Sequence[Turn], kind: str) -> int:
    return sum(turn.media.count(kind) for turn in turns)


def _marks(turns: Sequence[Turn], kind: str) -> tuple[int, int]:
    """Marks of a kind in what the user says, and in what others say."""
    counts = [0, 0]
    for turn in turns:
        counts[turn.role != "user"] += sum(
            part.media == kind and part.mark is not None for part in turn.parts
        )
    return counts[0], counts[1]


def _of_videos(turn: Turn) -> Turn:
    return replace(turn, parts=tuple(
        replace(part, media=VIDEO) if part.media == IMAGE and part.mark else part
        for part in turn.parts
    ))


def _as_text(
    turns: tuple[Turn, ...], which: Callable[[Turn, Part], bool]
) -> tuple[tuple[Turn, ...], int]:
    """The turns with marks as the text that they are written as, and how many these were."""
    count = 0
    made = []
    for turn in turns:
        parts: list[Part] = []
        joins = False  # the next text goes on with the one before
        for part in turn.parts:
            is_text = part.mark is not None and which(turn, part)
            count += is_text
            text = part.mark if is_text else part.text
            if text is not None and parts and parts[-1].text is not None and (is_text or joins):
                parts[-1] = Part(text=parts[-1].text + text)
            else:
                parts.append(Part(text=text) if is_text else part)
            joins = is_text
        made.append(replace(turn, parts=tuple(parts)) if count else turn)
    return tuple(made), count
