"""Which validation samples are shown on the page about a run, and what is shown of them.

Those of a dataset whose names' hashes are the lowest: the same ones at every validation, in every
layout, and from all over the split, though nobody knows beforehand how many samples it has.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from megatron_vl.data.conversation import Part, Turn
from megatron_vl.data.encode.media import thumbnail
from megatron_vl.models.media import StoredMedia

SHOWN = 12  # samples
_PICTURES = 4  # of one sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """What a person needs to judge an answer."""

    name: str  # of the sample
    dataset: str  # empty where there is one
    question: str
    pictures: tuple[bytes, ...]  # JPEG, of its first images and videos
    others: int = 0  # images and videos beyond them


class Candidates:
    """The samples read so far that may be shown."""

    def __init__(self) -> None:
        self._orders: dict[str, list[str]] = {}  # of each dataset, ascending

    def wants(self, dataset: str, name: str) -> bool:
        """Whether this sample is one of its dataset's first so far."""
        orders = self._orders.get(dataset, [])
        return len(orders) < SHOWN or _order(name) < orders[-1]

    def add(self, dataset: str, name: str) -> None:
        orders = self._orders.setdefault(dataset, [])
        bisect.insort(orders, _order(name))
        del orders[SHOWN:]


def preview_of(
    name: str, dataset: str, turns: Sequence[Turn], media: Sequence[StoredMedia],
    read: Callable[[str], bytes],
) -> Preview:
    """Of one sample; its question is what is said but for the assistant's turns.

    Args:
        read: a file's bytes by its name in `media`.

    Raises:
        BadMedia: an image or video that cannot be read or decoded.
    """
    said = (text_of(turn) for turn in turns if turn.role != "assistant")
    return Preview(
        name=name, dataset=dataset, question="\n".join(filter(None, said)),
        pictures=tuple(thumbnail(one, read, format="JPEG") for one in media[:_PICTURES]),
        others=max(0, len(media) - _PICTURES),
    )


def text_of(turn: Turn) -> str:
    """What a turn says, without its media."""
    return "".join(map(_text, turn.parts)).strip()


def chosen(named: Iterable[tuple[str, str]], *, of_each: bool = False) -> list[str]:
    """The names of the samples that are shown, whoever had which of them.

    As many of every dataset as there is room for.

    Args:
        named: dataset and name of every candidate.
        of_each: as many of each dataset as of all, where other ranks have candidates too.
    """
    datasets: dict[str, list[str]] = {}
    for dataset, name in sorted(set(named), key=lambda one: (one[0], _order(one[1]))):
        datasets.setdefault(dataset, []).append(name)
    if of_each:
        return list(chain.from_iterable(names[:SHOWN] for names in datasets.values()))
    rounds = chain.from_iterable(zip_longest(*datasets.values()))
    return [name for name in rounds if name is not None][:SHOWN]


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _text(part: Part) -> str:
    if part.box is not None:
        return " ".join(f"({x:g}, {y:g})" for x, y in part.box.points)
    return part.text or part.ref or ""
