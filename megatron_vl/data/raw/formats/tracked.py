"""Which keys of an entry are read, so that the others can be named."""

from __future__ import annotations

from collections.abc import Iterator

_LONGEST = 40  # characters of a key that are shown
_DEPTH = 3  # of lists in lists: a video's frames, in a list of videos


class Tracked(dict):
    """A JSON object that notes which of its keys are asked for; so do the objects in it.

    Whatever a format reads is known by that alone: there is no list of keys beside the code.
    """

    def __init__(self, value: dict, place: str, found: list[Tracked] | None = None):
        """`place`: what its keys are called, such as "turn key"."""
        super().__init__(value)
        self.place = place
        self.found = [] if found is None else found  # every object that was handed out
        self.found.append(self)
        self.asked: set = set()

    def get(self, key, default=None):
        return self[key] if key in self else default  # noqa: SIM401  (it is `get` itself)

    def __getitem__(self, key):
        value = dict.__getitem__(self, key)
        if key in self.asked:
            return value
        self.asked.add(key)
        if isinstance(value, (dict, list)):
            value = self.track(value, f"`{key}` key")
            self[key] = value
        return value

    def track(self, value, place: str, depth: int = _DEPTH):
        """`value`, or the like of it whose objects note what is read of them."""
        if isinstance(value, dict) and not isinstance(value, Tracked):
            return Tracked(value, place, self.found)
        if isinstance(value, list) and depth:
            return [self.track(one, place, depth - 1) for one in value]
        return value

    def unread(self) -> Iterator[str]:
        """Keys that hold something and were not asked for, with their place; each once."""
        named = {
            f"{one.place} {str(key)[:_LONGEST]!r}"
            for one in self.found if one.asked
            for key in one.keys() - one.asked
            if dict.__getitem__(one, key) not in (None, "", [], {})
        }
        yield from sorted(named)


def track_like(entry: dict, value, place: str):
    """`value` as a part of `entry`, if that is tracked."""
    return entry.track(value, place) if isinstance(entry, Tracked) else value


def call_keys(value, place: str) -> None:
    """Say what the keys of an object, or of those in a list, are called."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, Tracked):
            one.place = place
