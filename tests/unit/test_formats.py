"""What each raw format becomes, and what is refused, whatever an entry holds."""

import base64
import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vl.data.conversation import BadEntry, Conversation
from megatron_vl.data.formats import FORMATS, Fields, pickled

ROOT = Path(__file__).resolve().parents[2]
REASONS = {
    "unknown role", "mark count", "empty answer", "no answer", "bad box", "missing media",
    "unusable media", "too long", "reserved mark", "bad text", "wrong shape",
}  # fmt: skip
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
    """`role: text`, with [image] and [video] where they stand and | between texts."""
    return [
        f"{turn.role}: " + "|".join(f"[{p.media}]" if p.media else p.text for p in turn.parts)
        for turn in conversation.turns
    ]


def media(conversation):
    """(kind's first letter, what it is) of each image and video."""
    return [(m.kind[0], m.path or m.frames or m.data) for m in conversation.media]


def reason(format, entry, **fields):
    with pytest.raises(BadEntry) as caught:
        read(format, entry, **fields)
    assert caught.value.reason in REASONS
    return f"{caught.value.reason}: {caught.value}"


# ---- LLaVA and ShareGPT -----------------------------------------------------------------------


@pytest.mark.parametrize(("format", "entry", "said", "shown"), [
    # LLaVA: the one line break beside a mark belongs to it.
    ("llava", {"conversations": chat("<image>\nWhat?", "red"), "image": "0.jpg"},
     ["user: [image]|What?", "assistant: red"], [("i", "0.jpg")]),
    ("llava", {"conversations": chat("What?\n<image>", "red"), "image": "a/0.jpg"},
     ["user: What?|[image]", "assistant: red"], [("i", "a/0.jpg")]),
    ("llava", {"conversations": chat("<image>\n\nA <image>\n<image>", "x"), "image": [*"012"]},
     ["user: [image]|\nA |[image]|[image]", "assistant: x"], [("i", "0"), ("i", "1"), ("i", "2")]),
    ("llava", {"id": 7, "conversations": chat("Hello?", "Hi.", "<b>", "ok")},
     ["user: Hello?", "assistant: Hi.", "user: <b>", "assistant: ok"], []),
    ("llava", {"conversations": chat("<video>\nWhat?", "red"), "video": "a.mp4", "image": None},
     ["user: [video]|What?", "assistant: red"], [("v", "a.mp4")]),
    ("llava", {"conversations": [{"from": "system", "value": "Be brief."}, *chat("a", "b")]},
     ["system: Be brief.", "user: a", "assistant: b"], []),
    # ShareGPT: the text around a mark stays.
    ("sharegpt", {"messages": openai("<image>\nWhat?", "red"), "images": ["0.jpg"]},
     ["user: [image]|\nWhat?", "assistant: red"], [("i", "0.jpg")]),
    ("sharegpt", {"conversations": chat("a <image> b", "c", "<video><image>", "d"),
                  "images": ["0.jpg", "1.jpg"], "videos": "v.mp4", "system": "S"},
     ["system: S", "user: a |[image]| b", "assistant: c", "user: [video]|[image]", "assistant: d"],
     [("i", "0.jpg"), ("v", "v.mp4"), ("i", "1.jpg")]),
    ("sharegpt", {"messages": [{"role": "system", "content": "own"}, *openai("a", "b")],
                  "system": "column", "images": []},
     ["system: own", "user: a", "assistant: b"], []),
    ("sharegpt", {"messages": openai("<video>?", "x"), "videos": [["f/0.jpg", "f/1.jpg"]]},
     ["user: [video]|?", "assistant: x"], [("v", ("f/0.jpg", "f/1.jpg"))]),
    # As Hugging Face datasets write images to tables.
    ("sharegpt", {"messages": openai("<image><image>?", "x"),
                  "images": [{"bytes": PNG, "path": None}, {"bytes": None, "path": "1.png"}]},
     ["user: [image]|[image]|?", "assistant: x"], [("i", (PNG,)), ("i", "1.png")]),
])  # fmt: skip
def test_marks_are_the_places_of_the_media(format, entry, said, shown):
    made = read(format, entry)
    assert lines(made) == said
    assert media(made) == shown


def test_a_dataset_names_its_columns_and_tags():
    turns = chat("<image>?", "x", keys=("who", "text"), roles=("Q", "A"))
    entry = {"talk": [{"who": "S", "text": "s"}, *turns], "pictures": "0.jpg", "images": ["no.jpg"]}
    made = read(
        "sharegpt", entry, messages="talk", images="pictures", role_tag="who", content_tag="text",
        user_tag="Q", assistant_tag="A", system_tag="S",
    )  # fmt: skip
    assert lines(made) == ["system: s", "user: [image]|?", "assistant: x"]
    assert media(made) == [("i", "0.jpg")]


@pytest.mark.parametrize("format", ["llava", "sharegpt", "chatml", "qwen_vl"])
@pytest.mark.parametrize(("turns", "what"), [
    ([], "wrong shape: it has no list"),
    ("a", "wrong shape: it has no list"),
    (["a"], "wrong shape: turn 1 is 'a', not an object"),
    ([{"from": "human"}], "wrong shape: turn 1 has no text `value`"),
    ([{"role": "user", "content": ["a"]}], "wrong shape: turn 1 has no text `content`"),
    (chat("a", roles=("tool", "")), "unknown role: turn 1 is from 'tool', not one of: human, us"),
    (chat("a", roles=(["human"], "")), "unknown role: turn 1 is from a list"),
    (chat("a", "b", roles=("human", "function_call")), "unknown role: turn 2 is from 'function_"),
    ([*chat("a", "b"), {"from": "system", "value": ""}], "unknown role: turn 3 is a system turn"),
    (chat("a"), "no answer"),
    (chat("a", " "), "empty answer"),
    (chat("a <|video_pad|>", "b"), "reserved mark: turn 1"),
    (chat("a", "\ud83d"), "bad text: its text holds half a character"),
])  # fmt: skip
def test_a_turn_that_cannot_be_used_says_why(format, turns, what):
    assert reason(format, {"conversations": turns}).startswith(what)


def test_a_role_that_a_dataset_gives_to_tools_is_refused():
    entry = {"conversations": chat("a", "b", roles=("human", "assistant"))}
    assert reason("sharegpt", entry, function_tag="assistant").startswith("unknown role")


@pytest.mark.parametrize("format", ["llava", "sharegpt", "chatml"])
@pytest.mark.parametrize(("text", "columns", "what"), [
    ("<image>", {}, "mark count: it has 1 image marks for 0 images"),
    ("a", {"image": "0.jpg"}, "mark count: it has 0 image marks for 1 images"),
    ("<image><video>", {"images": ["0.jpg", "1.jpg"], "videos": ["a.mp4"]}, "mark count: it has 1"),
    ("<image>", {"images": [7]}, "wrong shape: one of its images is a value of type int"),
    ("<image>", {"images": [["0.jpg"]]}, "wrong shape: one of its images is a list"),
    ("<image>", {"images": {"a": 1}}, "wrong shape: one of its images is nothing"),
    ("<image>", {"images": [""]}, "missing media"),
    ("<image>", {"images": ["a\0b"]}, "missing media"),
    ("<image>", {"images": ["\ud83d.jpg"]}, "bad text"),
    ("<image>", {"image": "https://a.b/0.jpg"}, "missing media: its image 'https://a.b/0.jpg' is"),
    ("<image>", {"image": "data:image/png;base64,?"}, "unusable media: the base64 of its image"),
    ("<image>", {"image": "data:image/png,abc"}, "unusable media: the data: URL of its image is n"),
    ("<video>", {"videos": [["0.jpg", PNG]]}, "wrong shape: the frames of one of its videos"),
    ("<video>", {"videos": [[]]}, "wrong shape: one of its videos is a list"),
])  # fmt: skip
def test_media_that_cannot_be_used_say_why(format, text, columns, what):
    assert reason(format, {"conversations": chat(text, "x"), **columns}).startswith(what)


# ---- ChatML shards ----------------------------------------------------------------------------


def sample(turns, jpgs=(), videos=(), protocol=4, **more):
    said = json.dumps({"conversations": turns, **more} if more else turns).encode()
    parts = {"jpgs": list(jpgs), "videos": list(videos)}
    return {"json": said, **{name: pickle.dumps(part, protocol) for name, part in parts.items()}}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_media_of_every_protocol_are_read(protocol):
    turns = chat("<image>\n<image> <video>What? ", "x ", keys=("role", "content"))
    frames = [bytes([200 + i]) * 300 for i in range(3)]
    made = read("chatml", sample(turns, [PNG, PNG], [frames], protocol, second_per_grid_ts=[0.25]))
    assert lines(made) == ["user: [image]|[image]|[video]|What?", "assistant: x "]
    assert media(made) == [("i", (PNG,)), ("i", (PNG,)), ("v", tuple(frames))]
    assert made.media[2].fps == 4
    made = read("chatml", sample(turns, ["a.jpg", "图.jpg"], [("f/0.jpg", "f/1.jpg")], protocol))
    assert media(made)[1:] == [("i", "图.jpg"), ("v", ("f/0.jpg", "f/1.jpg"))]
    assert made.media[2].fps == 2


def test_a_chatml_sample_may_be_turns_alone():
    assert lines(read("chatml", {"json": json.dumps(chat(" a\n", "b")).encode()}))[0] == "user: a"


def test_the_json_of_chatml_names_a_video_s_file():
    made = read("chatml", {"conversations": chat("<video>\n?", "b"), "videos": ["a/b.mp4"]})
    assert media(made) == [("v", "a/b.mp4")]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class BuildBomb(Bomb):
    """The call is hidden behind a list, beside good bytes."""

    def __reduce__(self):
        return list, ([PNG, Bomb(self.path)],)


@pytest.mark.parametrize("bomb", [Bomb, BuildBomb])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_nothing(tmp_path, bomb, protocol):
    data = pickle.dumps([PNG, bomb(tmp_path / "made")], protocol)
    for part in ("jpgs", "videos"):
        entry = {"json": json.dumps(chat("<image><image>", "b")).encode(), part: data}
        found = reason("chatml", entry)
        assert found.startswith(f"unusable media: its `{part}` holds a pickle"), found
    assert not (tmp_path / "made").exists()
    pickle.loads(data)  # the bomb is real
    assert (tmp_path / "made").exists()


# A list that repeats one list: few bytes, many files.
MANY = pickle.dumps([["a.jpg"] * 300] * 300)
# Memory for a memo of four billion places, as pickle's own reader would make it.
HUGE_MEMO = b"\x80\x02]r\xff\xff\xff\xff."


@pytest.mark.parametrize(("data", "what"), [
    (b"", "is no pickle, or a broken one"),
    (b"abc", "is no pickle, or a broken one"),
    (PNG, "a pickle's instruction NEWFALSE"),
    (pickle.dumps([PNG])[:-9], "is no pickle, or a broken one"),
    (b"\x80\x04(.", "is pickled, but no list"),
    (b"\x80\x04e.", "is no pickle, or a broken one"),
    (b"\x80\x04h\x00.", "is no pickle, or a broken one"),
    (b"\x80\x04]\x8e" + b"\xff" * 8, "is no pickle, or a broken one"),
    (pickle.dumps({"a": PNG}), "instruction EMPTY_DICT"),
    (pickle.dumps([np.zeros(3, np.uint8)]), "numpy"),
    (pickle.dumps(PNG), "is pickled, but no list"),
    (MANY, "is a pickle of 90000 files"),
    (HUGE_MEMO, None),
])  # fmt: skip
def test_a_pickle_of_something_else_says_so(data, what):
    entry = {"json": json.dumps(chat("a", "b")).encode(), "videos": data}
    if what is None:
        assert media(read("chatml", entry)) == []
    else:
        assert "unusable media: its `videos` " in reason("chatml", entry)
        assert what in reason("chatml", entry)


def test_a_pickle_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(pickled, "MAX_BYTES", 100)
    assert "is pickled in" in reason("chatml", sample(chat("<image>", "b"), [PNG * 100]))


@pytest.mark.parametrize(("said", "what"), [
    (b"\xff\xfe\xfd", "bad text"),
    (b"{", "wrong shape: its `json` is not valid JSON"),
    (b"[" * 100_000, "wrong shape: its `json` is not valid JSON"),
    (b"1" * 10_000, "wrong shape: its `json` is not valid JSON"),
    (b"7", "wrong shape: its `json` is no list of turns"),
    (b"{}", "wrong shape: it has no list `conversations`"),
])  # fmt: skip
def test_broken_json_in_a_sample_says_so(said, what):
    assert reason("chatml", {"json": said}).startswith(what)


@pytest.mark.parametrize("seconds", [[0.5, 0.5], [0], [-1], ["a"], [True], [1e-320], {"a": 1}, 7,
                                     [10**400], [None]])  # fmt: skip
def test_frame_times_that_are_none_are_refused(seconds):
    entry = sample(chat("<video>", "b"), [], [[PNG]], second_per_grid_ts=seconds)
    assert reason("chatml", entry).startswith("wrong shape: its second_per_grid_ts")


# ---- messages ---------------------------------------------------------------------------------


def talk(*content, **more):
    answer = {"role": "assistant", "content": "x"}
    return {"messages": [{"role": "user", "content": list(content)}, answer], **more}


TEXT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(("entry", "said", "shown"), [
    (talk({"type": "image_url", "image_url": {"url": DATA_URL}}, TEXT),
     "user: [image]|What?", [("i", (PNG,))]),
    (talk({"type": "image_url", "image_url": "file:///a/b%20c.png"}, TEXT),
     "user: [image]|What?", [("i", "/a/b c.png")]),
    (talk(TEXT, {"type": "image", "image": "0.jpg", "text": None}, {"type": "image", "url": "1"}),
     "user: What?|[image]|[image]", [("i", "0.jpg"), ("i", "1")]),
    (talk({"type": "video", "video": "a.mp4"}, {"video_url": {"url": "file://b.mp4"}}),
     "user: [video]|[video]", [("v", "a.mp4"), ("v", "b.mp4")]),
    (talk({"image": "0.jpg"}, {"text": "?"}), "user: [image]|?", [("i", "0.jpg")]),
    (talk({"type": "image"}, {"type": "image", "image": "own.jpg"}, {"type": "image"}, TEXT,
          images=[{"bytes": PNG, "path": "0.jpg"}, "2.jpg"]),
     "user: [image]|[image]|[image]|What?", [("i", (PNG,)), ("i", "own.jpg"), ("i", "2.jpg")]),
    # Text is text, unless there are media it may mark.
    ({"messages": openai("an <image> tag", "x")}, "user: an <image> tag", []),
    ({"messages": openai("<image>\n?", "x"), "images": ["0"]}, "user: [image]|\n?", [("i", "0")]),
])  # fmt: skip
def test_content_lists_name_their_media(entry, said, shown):
    made = read("messages", entry)
    assert lines(made)[0] == said
    assert media(made) == shown


def test_frames_in_messages_have_a_rate():
    made = read("messages", talk({"type": "video", "video": ["0.jpg", "1.jpg"], "fps": 5}))
    assert made.media[0].frames == ("0.jpg", "1.jpg")
    assert made.media[0].fps == 5


def test_a_developer_s_message_is_the_system_prompt():
    entry = {"messages": [{"role": "developer", "content": "S"}, *openai("a", "b")]}
    assert lines(read("messages", entry))[0] == "system: S"


@pytest.mark.parametrize(("content", "more", "what"), [
    ({"type": "input_audio"}, {}, "wrong shape: turn 1 has content of type 'input_audio'"),
    ({}, {}, "wrong shape: turn 1 has content of type nothing"),
    ("a", {}, "wrong shape: turn 1 has 'a' in its content"),
    ({"type": "text"}, {}, "wrong shape: turn 1 has content without its `text`"),
    ({"type": "image"}, {}, "mark count: it has 1 image marks for 0 images"),
    (TEXT, {"images": ["0.jpg"]}, "mark count: it has 0 image marks for 1 images"),
    ({"type": "image_url"}, {}, "missing media: turn 1 has an image_url without a URL"),
    ({"type": "image_url", "image_url": {"url": "http://a/0.jpg"}}, {}, "missing media"),
    ({"type": "image", "image": 7}, {}, "wrong shape: one of its images is a value of type int"),
    ({"type": "video", "video": ["0.jpg"], "fps": "2"}, {}, "wrong shape: the fps of a video"),
])  # fmt: skip
def test_content_that_cannot_be_used_says_why(content, more, what):
    assert reason("messages", talk(content, **more)).startswith(what)


def test_turns_of_tools_in_messages_are_refused():
    entry = {"messages": [*openai("a", "b"), {"role": "tool", "content": "c"}]}
    assert reason("messages", entry).startswith("unknown role: turn 3 is from 'tool'")
    entry = {"messages": [*openai("a"), {"role": "assistant", "content": None, "tool_calls": []}]}
    assert reason("messages", entry) == "wrong shape: turn 2 has no text or list `content`"


# ---- Qwen-VL ----------------------------------------------------------------------------------


def qwen(question, answer="x"):
    return {"conversations": chat(question, answer, roles=("user", "assistant"))}


@pytest.mark.parametrize(("question", "said", "shown"), [
    ("Picture 1: <img>a/0 1.jpg</img>\nWhat?", "[image]|What?", [("i", "a/0 1.jpg")]),
    ("<img>0.jpg</img>What?", "[image]|What?", [("i", "0.jpg")]),
    # With several images the labels stay, as Qwen2-VL's template writes them.
    ("Picture 1: <img>0.jpg</img>\nPicture 2: <img>1.jpg</img>\nWhat?",
     "Picture 1: |[image]|Picture 2: |[image]|What?", [("i", "0.jpg"), ("i", "1.jpg")]),
    ("See\n<img>0</img>\n<img>1</img>", "See\n|[image]|[image]", [("i", "0"), ("i", "1")]),
    ("What?", "What?", []),
])  # fmt: skip
def test_paths_in_the_text_are_images(question, said, shown):
    made = read("qwen_vl", qwen(question))
    assert lines(made)[0] == f"user: {said}"
    assert media(made) == shown


REF, BOX, QUAD = (
    (f"<|{token}_start|>", f"<|{token}_end|>") for token in ("object_ref", "box", "quad")
)


@pytest.mark.parametrize(("answer", "said"), [
    ("<ref>the cat</ref><box>(10,20),(300,999)</box>.",
     "the cat".join(REF) + "(10,20),(300,999)".join(BOX) + "."),
    ("<ref>cats</ref><box>(0,0),(1,1)</box><box>( 5, 6 ), (7,8)</box>",
     "cats".join(REF) + "(0,0),(1,1)".join(BOX) + "(5,6),(7,8)".join(BOX)),
    ("<box>(5,5),(5,5)</box> a > b", "(5,5),(5,5)".join(BOX) + " a > b"),
    ("<quad>(9,1),(5,2),(3,4),(1,0)</quad>", "(9,1),(5,2),(3,4),(1,0)".join(QUAD)),
])  # fmt: skip
def test_boxes_are_written_as_qwen2_vl_has_them(answer, said):
    assert lines(read("qwen_vl", qwen("Where?", answer)))[1] == f"assistant: {said}"


@pytest.mark.parametrize(("text", "what"), [
    ("<box>(1,2),(3,1000)</box>", "bad box: turn 1 has the box '(1,2),(3,1000)', which is not wit"),
    ("<box>(1000,2),(1000,4)</box>", "bad box"),
    ("<box>(3,2),(1,5)</box>", "bad box: turn 1 has the box '(3,2),(1,5)', whose first corner"),
    ("<box>(1,5),(3,2)</box>", "bad box"),
    ("<box>(1,2)</box>", "bad box: turn 1 has the box '(1,2)', not 2 points (x,y)"),
    ("<box>(1,2)(3,4),</box>", "bad box"),
    ("<box>(-1,2),(3,4)</box>", "bad box"),
    ("<box>(1.5,2),(3,4)</box>", "bad box"),
    ("<box></box>", "bad box"),
    ("<quad>(1,2),(3,4)</quad>", "bad box: turn 1 has the quad '(1,2),(3,4)', not 4 points"),
    ("<box>(1,2),(3,4)", "bad box: turn 1 has a <box> without its other half"),
    ("<box>(1,2),(3,4)</ref>", "bad box"),
    ("a</ref>", "bad box: turn 1 has a </ref> without its other half"),
    ("<ref>a<ref>b</ref>", "bad box"),
    ("<img>0.jpg", "wrong shape: turn 1 has no path between <img> and </img>"),
    ("<img>a\nb</img>", "wrong shape"),
    ("<img></img>", "missing media"),
    ("<img>https://a.b/0.jpg</img>", "missing media"),
])  # fmt: skip
def test_a_bad_box_or_path_is_refused(text, what):
    assert reason("qwen_vl", qwen(text)).startswith(what)


# ---- Alpaca -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "fields", "said"), [
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, {},
     ["user: Add.\n1 2", "assistant: 3"]),
    ({"instruction": "Hi <image>", "input": "", "output": "Ho", "history": None}, {},
     ["user: Hi <image>", "assistant: Ho"]),
    ({"instruction": "c", "output": "d", "system": "S", "history": [["a", "b"]]}, {},
     ["system: S", "user: a", "assistant: b", "user: c", "assistant: d"]),
    ({"q": "c", "a": "d", "old": [["a", "b"]], "s": "S", "pics": ["0.jpg"], "instruction": "no"},
     {"prompt": "q", "response": "a", "history": "old", "system": "s", "images": "pics"}, None),
    ({"q": "<image>c", "a": "d", "s": "S", "pics": ["0.jpg"]},
     {"prompt": "q", "response": "a", "system": "s", "images": "pics"},
     ["system: S", "user: [image]|c", "assistant: d"]),
])  # fmt: skip
def test_alpaca_s_columns_are_a_conversation(entry, fields, said):
    if said is None:
        assert reason("alpaca", entry, **fields).startswith("mark count: it has 0 image marks")
    else:
        assert lines(read("alpaca", entry, **fields)) == said


@pytest.mark.parametrize(("entry", "what"), [
    ({"output": "x"}, "wrong shape: it has no text `instruction`"),
    ({"instruction": 7, "output": "x"}, "wrong shape: its `instruction` is a value of type int"),
    ({"instruction": "a"}, "wrong shape: its `output` is nothing, not text"),
    ({"instruction": "a", "output": ""}, "empty answer"),
    ({"instruction": "a", "output": "b", "history": [["a"]]}, "wrong shape: its `history` is no"),
    ({"instruction": "a", "output": "b", "history": [["a", 7]]}, "wrong shape: its `history` is"),
    ({"instruction": "a", "output": "b", "system": ["a"]}, "wrong shape: its `system` is a list"),
])  # fmt: skip
def test_alpaca_s_unusable_entries_say_why(entry, what):
    assert reason("alpaca", entry).startswith(what)


# ---- anything at all --------------------------------------------------------------------------

GOOD = {
    "llava": {"id": 1, "image": ["0.jpg"], "video": "a.mp4",
              "conversations": chat("<image>\n<video>?", "x")},
    "sharegpt": {"messages": openai("<image><video>?", "x"), "images": [{"path": "0.jpg"}],
                 "videos": [["f/0.jpg"]], "system": "S"},
    "chatml": {"conversations": chat("<image><video>?", "x"), "images": ["0.jpg"],
               "videos": ["a.mp4"]},
    "messages": talk({"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "image"},
                     {"type": "video", "video": ["0.jpg"], "fps": 2}, TEXT, images=["1.jpg"]),
    "qwen_vl": qwen("Picture 1: <img>0.jpg</img>\n?", "<ref>a</ref><box>(1,2),(3,4)</box>"),
    "alpaca": {"instruction": "<image>", "input": "b", "output": "c", "history": [["d", "e"]],
               "system": "S", "images": ["0.jpg"]},
}  # fmt: skip
WORDS = st.sampled_from((
    "<image>", "<video>", "<img>", "</img>", "<box>", "</box>", "(1,2)", "(", ",", "<ref>",
    "human", "gpt", "system", "user", "assistant", "type", "image", "url", "text", "from", "value",
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


def places(value, at=()):
    """The way to every part of a value."""
    yield at
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*at, key))


def usable_or_refused(format, entry):
    try:
        assert isinstance(read(format, entry), Conversation)
    except BadEntry as error:
        assert error.reason in REASONS
        str(error).encode()  # it is written to a file


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


# ---- what an import costs ---------------------------------------------------------------------


def test_formats_need_the_standard_library_alone():
    script = (
        "import sys, megatron_vl.data.formats\n"
        "heavy = {'torch', 'megatron', 'transformers', 'PIL', 'numpy', 'pyarrow'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
