"""Entries that are left out: which, why, and what a person can do about each reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.data.conversation import BadEntry
from megatron_vl.data.raw.formats import FORMATS, Fields

MENDS = {  # of each reason that `prepare` refuses for: see REASONS
    "wrong shape": "correct it, or give the --format of the file, or its own keys with --columns",
    "bad text": "save it as UTF-8",
    "reserved mark": "write the mark otherwise",
    "unknown role": "name the roles, such as --columns user_tag=NAME,assistant_tag=NAME",
    "mark count": "let the marks say where each image, video and object stands",
    "empty answer": "give the turn a text",
    "no answer": "let conversations end with an answer, and train one",
    "bad box": "correct the box",
    "missing media": "give --media-root the directory that the media are in",
    "unusable media": "give files that can be decoded and have what is asked of them",
    "not served": "change or remove what it names",
    "too long": "raise --max-length",
    "chat template": "give the --tokenizer of a model that takes such conversations",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """One entry that was left out."""

    file: str
    where: str  # in the file, such as "line 4"
    entry: int  # from 0, its place in the source
    id: str | None
    reason: str  # one of a few, to count by: see BadEntry
    message: str


def counted(refused: Sequence[Refusal]) -> list[str]:
    """A line for each reason, the most frequent first: how often, an example, the mend."""
    first: dict[str, Refusal] = {}
    for refusal in refused:
        first.setdefault(refusal.reason, refusal)
    return [
        f"{count} x {reason}, such as: {first[reason].message}; {MENDS[reason]}"
        for reason, count in Counter(refusal.reason for refusal in refused).most_common()
    ]


def other_formats(entry: object, format: str, fields: Fields) -> list[str]:
    """The formats, beside its own, in which an entry can be read."""
    return [name for name in FORMATS if name != format and _reads(name, entry, fields)]


def _reads(format: str, entry: object, fields: Fields) -> bool:
    try:
        FORMATS[format](entry, fields)
    except BadEntry:
        return False
    return True
