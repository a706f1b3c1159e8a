"""Keys of a turn that say whether it is trained.

| key | as in | |
|---|---|---|
| `loss` | ms-swift | true or false |
| `weight` | OpenAI, axolotl | 1 or 0 |
| `train`, `training` | axolotl | true or false |
| `loss_scale` | ms-swift | 1 or 0 |

Other weights are refused: the loss is a mean over tokens, which all count alike.
"""

from __future__ import annotations

from megatron_vl.data.conversation import BadEntry
from megatron_vl.data.raw.formats.turns import describe

_ASKS = ("loss", "train", "training")  # these can ask for what is no answer
_KEYS = (*_ASKS, "weight", "loss_scale")
_PARTS = ("train_detail", "training_detail")
_ANY = frozenset((*_KEYS, *_PARTS))


def is_trained(turn: dict, role: str, number: int) -> bool:
    """Whether a turn is to be trained if it is an answer.

    Raises:
        BadEntry: a weight between 0 and 1 or above, or a turn that is no answer asks for it.
    """
    if _ANY.isdisjoint(turn):
        return True
    for key in _PARTS:
        if turn.get(key):
            raise BadEntry(
                "not served", f"turn {number} has `{key}`, the loss of parts of a turn; split the "
                              f"turn, or remove the key"
            )
    trained = True
    for key in _KEYS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            shown = str(value)[:20] if isinstance(value, (int, float)) else describe(value)
            raise BadEntry(
                "not served", f"turn {number} has the `{key}` {shown}, but a turn is trained "
                              f"(1, true) or not (0, false)"
            )
        if value and key in _ASKS and role != "assistant":
            raise BadEntry(
                "not served", f"turn {number} is from {role} and has `{key}` {str(value).lower()}, "
                              f"but only answers are trained; remove the key"
            )
        trained = trained and bool(value)
    return trained
