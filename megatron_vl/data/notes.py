"""What the summary of `prepare` says of kept entries that are read other than they are written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_vl.data.conversation import Conversation
from megatron_vl.data.shards import Entry
from megatron_vl.errors import InputError

_MAX_NAMED = 20  # keys
# A mark where one stands for an image: at an end of the text, or alone on its line.
_BORDER = re.compile(r"(?m:^)\s*<(?:image|video)>|<(?:image|video)>\s*(?m:$)")


@dataclass
class Notes:
    """Kept entries whose marks and media do not pair off, or with keys that are not read."""

    unmarked: int = 0  # entries with media that no mark places
    as_text: int = 0  # entries with marks as text
    alike: int = 0  # of these, entries whose mark stands where an image would
    example: str = ""  # where the first of them is
    unread: Counter = field(default_factory=Counter)  # a key, by its place -> entries

    def add(self, conversation: Conversation, where: str) -> None:
        """`where`: the entry's place, such as "entry 2 of data.json"."""
        self.unread.update(conversation.unread)
        self.unmarked += conversation.unmarked > 0
        if conversation.marks_as_text:
            self.as_text += 1
            self.example = self.example or where
            self.alike += not conversation.media and any(
                turn.role == "user" and part.text and _BORDER.search(part.text)
                for turn in conversation.turns for part in turn.parts
            )

    def check(self, entries: Sequence[Entry]) -> None:
        """Raises InputError: all that should be shown is under a key that is not read."""
        if 2 * self.alike > len(entries) and not any(entry.media for entry in entries):
            keys = f" (not read: {self._keys()})" if self.unread else ""
            raise InputError(
                f"{self.alike} of {len(entries)} entries have <image> or <video> where an image or "
                f"video is meant, as {self.example} has, but none has any; name the key they are "
                f"under, such as --columns images=KEY{keys}."
            )

    def lines(self) -> Iterator[str]:
        """A line for each kind of note."""
        if self.unmarked:
            yield (
                f"entries with images or videos but no mark for them: {self.unmarked}; they were "
                f"put before the first question (--marks strict refuses such entries)"
            )
        if self.as_text:
            yield (
                f"entries with <image> or <video> as text, for want of images or videos: "
                f"{self.as_text}, such as {self.example} (where they are under another key, name "
                f"it with --columns; --marks strict refuses such entries)"
            )
        if self.unread:
            yield f"keys that are not read: {self._keys()}"

    def _keys(self) -> str:
        """The most frequent of them."""
        named = self.unread.most_common(_MAX_NAMED)
        shown = ", ".join(
            f"{key} in {count} {'entry' if count == 1 else 'entries'}" for key, count in named
        )
        more = len(self.unread) - len(named)
        return f"{shown}{f', and {more} other keys' if more else ''}"
