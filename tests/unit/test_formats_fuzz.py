"""Whatever stands in an entry, it is a conversation or refused by name."""

import copy
import json
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import places
from raw_entries import (
    DATA_URL,
    PNG,
    TEXT,
    chat,
    openai,
    qwen,
    read,
    sample,
    talk,
    usable_or_refused,
)

from megatron_vl.data.raw.formats import FORMATS

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
GOOD = {
    "llava": {"id": 1, "image": ["0.jpg"], "video": {"path": "a.mp4", "fps": 2, "video_end": 3},
              "conversations": chat("<image>\n<video><ref-object>?", "<bbox>"), "objects": {
                  "ref": ["a"], "bbox": [[1, 2, 3, 4.5]], "image_id": [0], "bbox_type": "real"}},
    "sharegpt": {"messages": [*openai("<image><video>?"),
                              {"role": "function_call", "content": json.dumps(CALL["function"])},
                              {"role": "observation", "content": "b"},
                              {"role": "assistant", "content": "c", "loss": True, "weight": 1}],
                 "images": [{"path": "0.jpg", "max_pixels": 9}], "tools": json.dumps(TOOLS),
                 "videos": [["f/0.jpg"]], "system": "S"},
    "chatml": {"conversations": chat("<image><video>?", "x"), "images": ["0.jpg"],
               "videos": ["a.mp4"]},
    "messages": {"tools": TOOLS, "images": ["1.jpg"], "messages": [
        *talk({"type": "image_url", "image_url": {"url": DATA_URL}, "resized_height": 9,
               "resized_width": 9}, {"type": "image"},
              {"type": "video", "video": ["0.jpg"], "fps": 2, "nframes": 2}, TEXT)["messages"][:1],
        {"role": "assistant", "content": None, "tool_calls": [CALL], "loss": False},
        {"role": "tool", "tool_call_id": "c", "content": "d"},
        {"role": "assistant", "content": "e"}]},
    "qwen_vl": qwen("Picture 1: <img>0.jpg</img>\n?", "<ref>a</ref><box>(1,2),(3,4)</box>"),
    "alpaca": {"instruction": "<image>", "input": "b", "output": "c", "history": [["d", "e"]],
               "system": "S", "images": ["0.jpg"], "tools": TOOLS},
}  # fmt: skip
WORDS = st.sampled_from((
    "<image>", "<video>", "<img>", "</img>", "<box>", "</box>", "(1,2)", "(", ",", "<ref>",
    "human", "gpt", "system", "user", "assistant", "type", "image", "url", "text", "from", "value",
    "<bbox>", "<ref-object>", "ref", "bbox", "tools", "name", "arguments", "{", "loss", "weight",
    "role", "content", "bytes", "path", "fps", "file://", "data:;base64,", "http://", "\0", "\n",
    "\ud800", "",
))  # fmt: skip
TEXTS = st.lists(WORDS, max_size=4).map("".join) | st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)

# A machine that is busy with other work is no fault.
MANY_TIMES = settings(
    max_examples=100, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("format", FORMATS)
def test_the_entries_that_are_changed_below_are_good(format):
    read(format, GOOD[format])


@pytest.mark.parametrize("format", FORMATS)
@MANY_TIMES
@given(data=st.data())
def test_any_value_anywhere_is_a_conversation_or_refused(format, data):
    entry = copy.deepcopy(GOOD[format])
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from([at for at in places(entry) if at]))
        part = entry
        for key in way:
            part = part[key]
        part[last] = data.draw(JSON)
    usable_or_refused(format, entry)


@MANY_TIMES
@given(said=JSON, parts=st.dictionaries(st.sampled_from(("jpgs", "videos")), st.binary()))
def test_any_bytes_in_a_sample_are_a_conversation_or_refused(said, parts):
    usable_or_refused("chatml", {"json": json.dumps(said).encode(), **parts})


@MANY_TIMES
@given(data=st.data())
def test_any_change_of_a_pickle_is_read_or_refused(data):
    protocol = data.draw(st.integers(0, pickle.HIGHEST_PROTOCOL))
    entry = sample(chat("<image><video>", "x"), [PNG], [[PNG, PNG]], protocol)
    pickled = bytearray(entry["videos"])
    for _ in range(data.draw(st.integers(1, 4))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    usable_or_refused("chatml", {**entry, "videos": bytes(pickled)})


