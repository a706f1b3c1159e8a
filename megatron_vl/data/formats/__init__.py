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
what is wrong with it, whatever the entry holds. They share `turns`, `media_columns` and `marks`,
which pairs marks with media; `pickled` reads ChatML's parts; `fields` are the names a dataset gives
its columns and roles.
"""

from collections.abc import Callable

from megatron_vl.data.conversation import Conversation
from megatron_vl.data.formats import alpaca, chatml, llava, messages, qwen_vl, sharegpt
from megatron_vl.data.formats.fields import Fields

__all__ = ["FORMATS", "Fields"]

FORMATS: dict[str, Callable[[dict, Fields], Conversation]] = {
    "llava": llava.read,
    "sharegpt": sharegpt.read,
    "chatml": chatml.read,
    "messages": messages.read,
    "qwen_vl": qwen_vl.read,
    "alpaca": alpaca.read,
}
