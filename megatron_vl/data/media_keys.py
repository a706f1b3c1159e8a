"""What an entry asks for one of its images or videos: the keys it may do so by. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_vl.models.media import FRAME_KEYS, MAX_FPS, MediaSettings

VIDEO_KEYS = ("total_pixels", *FRAME_KEYS)


def settings_of(keys: Mapping, names: tuple[str, ...]) -> MediaSettings | None:
    """The settings among `keys`, of those `names`; None where there are none.

    Raises:
        ValueError: see `MediaSettings`.
    """
    given = {name: keys.get(name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return MediaSettings(**given) if given else None


def rate(value) -> float | None:
    """What some know as frames a second, or None if it cannot be that."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 < value <= MAX_FPS else None
