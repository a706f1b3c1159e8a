"""Raw entries for the tests of formats: how to write them, read them, and say what was read."""

import base64
import json
import pickle

import pytest

from megatron_vl.data.conversation import REASONS, BadEntry, Conversation
from megatron_vl.data.raw.formats import FORMATS, Fields

TEXT = {"type": "text", "text": "What?"}
PNG = b"\x89PNG\r\n\x1a\n..."
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def chat(*texts, keys=("from", "value"), roles=("human", "gpt")):
    """Turns of both sides, one after another."""
    return [dict(zip(keys, (roles[i % 2], t), strict=True)) for i, t in enumerate(texts)]


def openai(*texts):
    return chat(*texts, keys=("role", "content"), roles=("user", "assistant"))


def read(format, entry, **fields):
    return FORMATS[format](entry, Fields(**fields))


def lines(conversation):
    """`role: text`, with [image], [video], <ref> and (x,y)-(x,y)/width where they stand.

    Between parts is |; a box in pixels has no width. # is the number of a box's image.
    """
    return [f"{turn.role}: " + "|".join(map(_shown, turn.parts)) for turn in conversation.turns]


def _shown(part):
    if part.box is not None:
        points = "-".join(f"({x:g},{y:g})" for x, y in part.box.points)
        points += f"/{part.box.size[0]:g}" if part.box.size else ""
        return points + ("" if part.box.image is None else f"#{part.box.image}")
    if part.ref is not None:
        return f"<{part.ref}>"
    return f"[{part.media}]" if part.media else part.text


def media(conversation):
    """(kind's first letter, what it is) of each image and video."""
    return [(m.kind[0], m.path or m.frames or m.data) for m in conversation.media]


def reason(format, entry, **fields):
    with pytest.raises(BadEntry) as caught:
        read(format, entry, **fields)
    assert caught.value.reason in REASONS
    return f"{caught.value.reason}: {caught.value}"


def talk(*content, **more):
    answer = {"role": "assistant", "content": "x"}
    return {"messages": [{"role": "user", "content": list(content)}, answer], **more}


def qwen(question, answer="x"):
    return {"conversations": chat(question, answer, roles=("user", "assistant"))}


def sample(turns, jpgs=(), videos=(), protocol=4, **more):
    said = json.dumps({"conversations": turns, **more} if more else turns).encode()
    parts = {"jpgs": list(jpgs), "videos": list(videos)}
    return {"json": said, **{name: pickle.dumps(part, protocol) for name, part in parts.items()}}


def usable_or_refused(format, entry):
    try:
        assert isinstance(read(format, entry), Conversation)
    except BadEntry as error:
        assert error.reason in REASONS
        str(error).encode()  # it is written to a file
