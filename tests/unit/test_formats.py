"""What each raw format becomes, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
from raw_entries import DATA_URL, PNG, TEXT, chat, lines, media, openai, qwen, read, reason, talk

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("format", ["llava", "sharegpt", "chatml", "messages", "qwen_vl"])
def test_a_system_prompt_may_be_a_column(format):
    entry = {"conversations": chat("a", "b"), "system": "S", "rule": "R"}
    if format == "messages":
        entry["conversations"] = openai("a", "b")
    said = ["user: a", "assistant: b"]
    assert lines(read(format, entry)) == ["system: S", *said]
    assert lines(read(format, entry, system="rule")) == ["system: R", *said]
    assert lines(read(format, entry, system="")) == said
    assert reason(format, entry | {"system": 5}).startswith("wrong shape: its `system` is")
    assert reason(format, entry | {"system": "\ud83d"}).startswith("bad text: its system prompt h")


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
    (chat("a", roles=("judge", "")), "unknown role: turn 1 is from 'judge', not one of: human, us"),
    (chat("a", roles=(["human"], "")), "unknown role: turn 1 is from a list"),
    (chat("a", "b", roles=("human", "function_call")), "wrong shape: the call in turn 2 is"),
    ([*chat("a", "b"), {"from": "system", "value": ""}], "unknown role: turn 3 is a system turn"),
    (chat("a"), "no answer"),
    (chat("a", " "), "empty answer"),
    (chat("a <|video_pad|>", "b"), "reserved mark: turn 1"),
    (chat("a", "b<|im_end|>\n<|im_start|>user"), "reserved mark: turn 2 holds the reserved mark <"),
    (chat("a", "\ud83d"), "bad text: turn 2 holds half a character"),
])  # fmt: skip
def test_a_turn_that_cannot_be_used_says_why(format, turns, what):
    for beside in ({}, {"system": "S"}):  # which no turn's number counts
        assert reason(format, {"conversations": turns} | beside).startswith(what)


@pytest.mark.parametrize("format", ["llava", "sharegpt", "chatml"])
@pytest.mark.parametrize(("text", "columns", "what"), [
    ("<image>", {"images": ["0.jpg", "1.jpg"]}, "mark count: it has 1 image marks for 2 images"),
    ("<image><video>", {"images": ["0.jpg", "1.jpg"], "videos": ["a.mp4"]}, "mark count: it has 1"),
    ("<image>", {"images": [7]}, "wrong shape: one of its images is a value of type int"),
    ("<image>", {"images": [["0.jpg"]]}, "wrong shape: one of its images is a list"),
    ("<image>", {"images": {"a": 1}}, "wrong shape: one of its images is nothing"),
    ("<image>", {"images": [""]}, "missing media: the text has <image>, but its list of images"),
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


# ---- messages ---------------------------------------------------------------------------------




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
    ({"type": "image_url"}, {}, "missing media: turn 1 has an image_url without a URL"),
    ({"type": "image_url", "image_url": {"url": "http://a/0.jpg"}}, {}, "missing media"),
    ({"type": "image", "image": 7}, {}, "wrong shape: one of its images is a value of type int"),
    ({"type": "video", "video": ["0.jpg"], "fps": "2"}, {}, "wrong shape: the fps of one of its"),
])  # fmt: skip
def test_content_that_cannot_be_used_says_why(content, more, what):
    assert reason("messages", talk(content, **more)).startswith(what)


def test_an_answer_that_neither_says_nor_calls_is_refused():
    entry = {"messages": [*openai("a"), {"role": "assistant", "content": None, "tool_calls": []}]}
    assert reason("messages", entry) == "wrong shape: turn 2 has no text or list `content`"


# ---- Qwen-VL ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("answer", "said"), [
    ("<ref>the cat</ref><box>(10,20),(300,999)</box>.", "<the cat>|(10,20)-(300,999)/1000|."),
    ("<ref>cats</ref><box>(0,0),(1,1)</box><box>( 5, 6 ), (7,8)</box>",
     "<cats>|(0,0)-(1,1)/1000|(5,6)-(7,8)/1000"),
    ("<box>(5,5),(5,5)</box> a > b", "(5,5)-(5,5)/1000| a > b"),
    ("<quad>(9,1),(5,2),(3,4),(1,0)</quad>", "(9,1)-(5,2)-(3,4)-(1,0)/1000"),
    # Mended where there is one meaning: the edge, broken numbers, corners the wrong way round.
    ("<box>(1,2),(3,1000)</box>", "(1,2)-(3,1000)/1000"),
    ("<box>(1.5,2.),(3,4)</box>", "(1.5,2)-(3,4)/1000"),
    ("<box>(3,2),(1,5)</box>", "(1,2)-(3,5)/1000"),
    ("<box>(1,5),(3,2)</box>", "(1,2)-(3,5)/1000"),
])  # fmt: skip
def test_boxes_are_numbers_until_a_model_writes_them(answer, said):
    assert lines(read("qwen_vl", qwen("Where?", answer)))[1] == f"assistant: {said}"
    assert lines(read("qwen_vl", qwen(answer)))[0] == f"user: {said}"


@pytest.mark.parametrize("question", [
    "Answer as <box>(x1,y1),(x2,y2)</box>.", "What does <box></box> mean?", "Use <box> and </box>.",
    "Draw a <box> around it.", "a</ref>", "<ref>a<quad>", "<box>a, b</ref>",
])
def test_a_tag_that_a_question_speaks_of_is_text(question):
    assert lines(read("qwen_vl", qwen(question)))[0] == f"user: {question}"
    assert reason("qwen_vl", qwen("Where?", question)).startswith("bad box: turn 2")


@pytest.mark.parametrize(("text", "what"), [
    ("<box>(1,2),(3,1001)</box>", "bad box: it has the box (1,2),(3,1001), which is not within"),
    ("<box>(-1,2),(3,4)</box>", "bad box: it has the box (-1,2),(3,4), which is not within"),
    ("<box>(1,2)</box>", "bad box: turn 1 has the box '(1,2)', not 2 points (x,y)"),
    ("<box>(1,2)(3,4),</box>", "bad box"),
    ("<box>(0.1,0.2),(0.5,1)</box>", "bad box: turn 1 has the box '(0.1,0.2),(0.5,1)', which may"),
    ("<quad>(1,2),(3,4)</quad>", "bad box: turn 1 has the quad '(1,2),(3,4)', not 4 points"),
    ("<box>(1,2),(3,4)", "bad box: turn 1 has a <box> without its other half"),
    ("<box>(1,2),(3,4)</ref>", "bad box"),
    ("<image><image>?", "mark count: it has 2 image marks for 1 images"),
    ("<img>1.jpg</img>", "mark count: its text and its columns name different media"),
    ("<img>0.jpg", "wrong shape: turn 1 has no path between <img> and </img>"),
    ("<img>a\nb</img>", "wrong shape"),
    ("<img></img>", "missing media"),
    ("<img>https://a.b/0.jpg</img>", "missing media"),
])  # fmt: skip
def test_a_bad_box_or_path_is_refused(text, what):
    assert reason("qwen_vl", qwen(text) | {"images": ["0.jpg"]}).startswith(what)


# ---- Alpaca -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "fields", "said"), [
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, {},
     ["user: Add.\n1 2", "assistant: 3"]),
    ({"instruction": "Hi <image>", "input": "", "output": "Ho", "history": None}, {},
     ["user: Hi <image>", "assistant: Ho"]),
    ({"instruction": "c", "output": "d", "system": "S", "history": [["a", "b"]]}, {},
     ["system: S", "user: a", "assistant: b", "user: c", "assistant: d"]),
    ({"q": "c", "a": "d", "old": [["a", "b"]], "s": "S", "pics": ["0.jpg"], "instruction": "no"},
     {"prompt": "q", "response": "a", "history": "old", "system": "s", "images": "pics"},
     ["system: S", "user: [image]|a", "assistant: b", "user: c", "assistant: d"]),
    ({"q": "<image>c", "a": "d", "s": "S", "pics": ["0.jpg"]},
     {"prompt": "q", "response": "a", "system": "s", "images": "pics"},
     ["system: S", "user: [image]|c", "assistant: d"]),
])  # fmt: skip
def test_alpaca_s_columns_are_a_conversation(entry, fields, said):
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


# ---- what an import costs ---------------------------------------------------------------------


def test_formats_need_the_standard_library_alone():
    script = (
        "import sys, megatron_vl.data.raw.formats\n"
        "heavy = {'torch', 'megatron', 'transformers', 'PIL', 'numpy', 'pyarrow'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
