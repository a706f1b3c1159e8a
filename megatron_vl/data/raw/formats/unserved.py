"""Keys of an entry that say it is not meant to be trained on as it would be."""

from __future__ import annotations

from megatron_vl.data.conversation import BadEntry
from megatron_vl.data.media_keys import VIDEO_KEYS
from megatron_vl.data.raw.formats.fields import Fields
from megatron_vl.models.media import FRAME_KEYS, PIXEL_KEYS

_PREFERENCES = "preferences are not trained on; keep the good answers, without this key"
_CONTRASTS = "positive and negative examples are not trained on; remove it to train the answers"
_AUDIO = "audio is not trained on; remove it and its marks to train the rest"
_UNSERVED = {
    **dict.fromkeys(
        ("rejected_response", "rejected", "rejected_messages", "rejected_images", "chosen"),
        _PREFERENCES,
    ),
    **dict.fromkeys(("positive_messages", "negative_messages"), _CONTRASTS),
    **dict.fromkeys(("audios", "audio"), _AUDIO),
}
# `fps` beside the turns is often what the video has, not what is to be taken of it.
_OF_ONE_MEDIUM = tuple(
    key for key in dict.fromkeys((*PIXEL_KEYS, *VIDEO_KEYS, *FRAME_KEYS)) if key != "fps"
)
_LABELS = ("label", "kto_tag")  # elsewhere `label` is what is in an image
# Of a turn; beside the turns other values may be anything else's.
_LOSSES = ("loss", "loss_scale", "train", "training", "weight")
_ANY = frozenset((*_UNSERVED, *_OF_ONE_MEDIUM, *_LABELS, *_LOSSES))


def refuse_unserved(entry: dict, fields: Fields) -> None:
    """Refuse an entry that would be trained on other than it is meant.

    Raises:
        BadEntry: it has such a key.
    """
    if _ANY.isdisjoint(entry):
        return
    named = {getattr(fields, name) for name in fields.__slots__}
    for key, why in _UNSERVED.items():
        if key not in named and dict.get(entry, key):  # asked past what notes what is read
            raise BadEntry("not served", f"it has `{key}`, but {why}")
    for key in _LABELS:
        value = dict.get(entry, key)
        if key not in named and isinstance(value, bool):
            raise BadEntry("not served", f"its `{key}` is {str(value).lower()}, but {_PREFERENCES}")
    for key in _LOSSES:
        value = dict.get(entry, key)
        if key not in named and isinstance(value, (bool, int, float)) and not value:
            raise BadEntry(
                "not served", f"its `{key}` beside the turns is {str(value).lower()}, as of what "
                              f"is not to be trained; remove the entry, or the key"
            )
    for key in _OF_ONE_MEDIUM:
        if key not in named and dict.get(entry, key) is not None:
            raise BadEntry(
                "not served", f"it has `{key}` beside its turns, which does not say of which image "
                              f'or video; write {{"path": .., "{key}": ..}} in its list of them'
            )
