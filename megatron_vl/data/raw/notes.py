"""What the summary of `prepare` says of kept entries that are read other than they are written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_vl.data.conversation import Conversation
from megatron_vl.data.raw.shards import Entry
from megatron_vl.errors import InputError

_MAX_NAMED = 20  # keys
# A mark where one stands for an image: at an end of the text, or alone on its line.
_BORDER = re.compile(r"(?m:^)\s*<(?:image|video)>|<(?:image|video)>\s*(?m:$)")


class _Note(NamedTuple):
    """Of one entry."""

    where: str
    unmarked: bool  # it has media that no mark places
    as_text: bool  # it has marks as text
    alike: bool  # a mark as text stands where an image would
    calls: bool  # it has functions to call, or calls
    unread: tuple[str, ...]  # keys, by their places


@dataclass
class Notes:
    """Kept entries whose marks and media do not pair off, or with keys that are not read."""

    templated: bool  # whether a model's chat template is tried on every entry
    by_entry: dict[int, _Note] = field(default_factory=dict)

    def add(self, number: int, conversation: Conversation, where: str) -> None:
        """`number`: the entry's; `where`: its place, such as "entry 2 of data.json"."""
        as_text = conversation.marks_as_text > 0
        calls = bool(conversation.tools) or any(turn.of_tools for turn in conversation.turns)
        if conversation.unmarked or as_text or calls or conversation.unread:
            alike = as_text and not conversation.media and any(
                turn.role == "user" and part.text and _BORDER.search(part.text)
                for turn in conversation.turns for part in turn.parts
            )
            self.by_entry[number] = _Note(
                where, conversation.unmarked > 0, as_text, alike, calls, tuple(conversation.unread)
            )

    def drop(self, number: int) -> None:
        """The entry is refused after all."""
        self.by_entry.pop(number, None)

    def check(self, entries: Sequence[Entry]) -> None:
        """Raises InputError: all that should be shown is under a key that is not read."""
        alike = [note for note in self.by_entry.values() if note.alike]
        if 2 * len(alike) > len(entries) and not any(entry.media for entry in entries):
            unread = self._unread()
            keys = f" (not read: {_named(unread)})" if unread else ""
            raise InputError(
                f"{len(alike)} of {len(entries)} entries have <image> or <video> where an image or "
                f"video is meant, as {alike[0].where} has, but none has any; name the key they are "
                f"under, such as --columns images=KEY{keys}."
            )

    def lines(self) -> Iterator[str]:
        """A line for each kind of note."""
        if unmarked := sum(note.unmarked for note in self.by_entry.values()):
            yield (
                f"entries with images or videos but no mark for them: {unmarked}; they were "
                f"put before the first question (--marks strict refuses such entries)"
            )
        if as_text := [note for note in self.by_entry.values() if note.as_text]:
            yield (
                f"entries with <image> or <video> as text, for want of images or videos: "
                f"{len(as_text)}, such as {as_text[0].where} (where they are under another key, "
                f"name it with --columns; --marks strict refuses such entries)"
            )
        calls = [note for note in self.by_entry.values() if note.calls]
        if calls and not self.templated:
            yield (
                f"entries that call functions: {len(calls)}, such as {calls[0].where}; not every "
                f"model's chat template writes calls: --tokenizer and --max-length try it now"
            )
        if unread := self._unread():
            yield f"keys that are not read: {_named(unread)}"

    def _unread(self) -> Counter[str]:
        """A key, by its place -> entries."""
        return Counter(key for note in self.by_entry.values() for key in note.unread)


def _named(unread: Counter[str]) -> str:
    """The most frequent of the keys."""
    named = unread.most_common(_MAX_NAMED)
    shown = ", ".join(
        f"{key} in {count} {'entry' if count == 1 else 'entries'}" for key, count in named
    )
    more = len(unread) - len(named)
    return f"{shown}{f', and {more} other keys' if more else ''}"
