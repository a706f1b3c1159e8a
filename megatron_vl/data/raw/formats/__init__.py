"""Raw data formats: one module each, all giving `megatron_vl.data.conversation`. Pure Python.

| format | entries | media |
|---|---|---|
| `llava` | `conversations` of LLaVA-Pretrain and LLaVA-Instruct | `image`, `<image>` in the text |
| `sharegpt` | `messages` or `conversations` of LLaMA-Factory | `images`, `videos`, marks |
| `chatml` | ChatML WebDataset shards, or the JSON they come from | pickled, or as sharegpt |
| `messages` | `messages` with content lists of the OpenAI API | inside the content |
| `qwen_vl` | `conversations` of Qwen-VL, with boxes | `<img>path</img>` in the text |
| `alpaca` | `instruction`, `input`, `output` | none, or as sharegpt |

Every module has `read(entry, fields)`: the conversation of one entry, or a `BadEntry` that says
what is wrong with it, whatever the entry holds. They share `turns`, `dialogue`, `media_columns` and
`marks`, which pairs marks with media; beside the turns stand `loss`, `tools` and `objects`, and
what is `unserved`; `pickled` reads ChatML's parts; `fields` are the names a dataset gives its
columns and roles; of an entry that is read, `tracked` knows the keys that were not.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from megatron_vl.data.conversation import Conversation
from megatron_vl.data.raw.formats import alpaca, chatml, llava, messages, qwen_vl, sharegpt
from megatron_vl.data.raw.formats.fields import Fields
from megatron_vl.data.raw.formats.tracked import Tracked

__all__ = ["FORMATS", "Fields"]


def _read(format, entry: dict, fields: Fields) -> Conversation:
    """The conversation of an entry, and the keys that the format did not ask for."""
    tracked = Tracked(entry, "entry key")
    tracked.asked.add("id")  # a sample's name, in every format
    made, unread = format.read(tracked, fields), tuple(tracked.unread())
    return replace(made, unread=unread) if unread else made


FORMATS: dict[str, Callable[[dict, Fields], Conversation]] = {
    name: partial(_read, module)
    for name, module in {
        "llava": llava, "sharegpt": sharegpt, "chatml": chatml, "messages": messages,
        "qwen_vl": qwen_vl, "alpaca": alpaca,
    }.items()
}
