"""Marks and media that do not pair off: a place, text, or a refusal, never a guess."""

import json

import pytest
from PIL import Image
from raw_entries import TEXT, chat, lines, media, openai, qwen, read, reason, talk

from megatron_vl.cli.main import run

CHAT = ("llava", "sharegpt", "chatml", "messages", "qwen_vl", "alpaca")


def said(format, question, answer="x", **columns):
    """An entry of one question and its answer."""
    if format == "alpaca":
        return {"instruction": question, "output": answer, **columns}
    turns = openai(question, answer) if format == "messages" else chat(question, answer)
    return {"conversations": turns, **columns}


# ---- media without a mark ---------------------------------------------------------------------


@pytest.mark.parametrize("format", CHAT)
@pytest.mark.parametrize(("question", "columns", "first", "shown", "unmarked"), [
    ("What?", {"images": ["0", "1"]}, "[image]|[image]|What?", [("i", "0"), ("i", "1")], 2),
    ("What?", {"videos": ["v"]}, "[video]|What?", [("v", "v")], 1),
    # ms-swift puts one kind before the other.
    ("What?", {"images": "0", "videos": "v"}, "[video]|[image]|What?", [("v", "v"), ("i", "0")], 2),
    ("a<image>", {"images": "0", "videos": "v"}, "[video]|a|[image]", [("v", "v"), ("i", "0")], 1),
    ("<image>a", {"images": "0"}, "[image]|a", [("i", "0")], 0),
])  # fmt: skip
def test_media_without_a_mark_come_first(format, question, columns, first, shown, unmarked):
    made = read(format, said(format, question, **columns))
    assert lines(made) == [f"user: {first}", "assistant: x"]
    assert media(made) == shown
    assert made.unmarked == unmarked


def test_media_without_a_mark_come_before_the_first_user_turn():
    entry = {"messages": [{"role": "system", "content": "S"}, *openai("a", "b", "c", "d")]}
    made = read("sharegpt", entry | {"images": ["0"]})
    assert lines(made)[:2] == ["system: S", "user: [image]|a"]
    assert lines(read("messages", talk(TEXT, images=["0"])))[0] == "user: [image]|What?"
    alone = {"messages": openai("a", "b")[1:], "images": ["0"]}
    assert reason("sharegpt", alone).startswith("mark count: it has 0 image")


# ---- marks without media ----------------------------------------------------------------------


@pytest.mark.parametrize("format", CHAT)
@pytest.mark.parametrize(("question", "answer", "columns", "turns", "as_text"), [
    ("What is\n<image>\n?", "x", {}, ["What is\n<image>\n?", "x"], 1),
    ("<image>", "a <video> tag", {}, ["<image>", "a <video> tag"], 2),
    ("a <image> b <image>", "x", {"images": []}, ["a <image> b <image>", "x"], 2),
    ("?", "x", {"images": [None]}, ["?", "x"], 0),
    ("?", "x", {"images": ["", None]}, ["?", "x"], 0),
    ("?", "x", {"image": "", "videos": [""]}, ["?", "x"], 0),
    ("?", "x", {"images": [{"bytes": None, "path": None}]}, ["?", "x"], 0),
    ("?", "x", {"images": [{"bytes": b"", "path": "", "max_pixels": None}]}, ["?", "x"], 0),
    ("<image>?", "Write <image>\n.", {"images": "0"}, ["[image]|?", "Write <image>\n."], 1),
    ("<image>?", "a <video>", {"images": "0"}, ["[image]|?", "a <video>"], 1),
    # A place in the answer stays one where there is a medium for each.
    ("?", "<image>x", {"images": "0"}, ["?", "[image]|x"], 0),
])  # fmt: skip
def test_marks_without_media_are_text(format, question, answer, columns, turns, as_text):
    made = read(format, said(format, question, answer, **columns))
    assert lines(made) == [f"user: {turns[0]}", f"assistant: {turns[1]}"]
    assert made.marks_as_text == as_text


@pytest.mark.parametrize("format", CHAT)
@pytest.mark.parametrize(("question", "answer", "columns", "what"), [
    ("<image><image>", "x", {"images": ["0"]}, "it has 2 image marks for 1 images; write <image>"),
    ("<image>", "x", {"images": ["0", "1"]}, "it has 1 image marks for 2 images"),
    ("?", "<image><image>a", {"images": ["0"]}, "it has 2 image marks for 1 images"),
    ("<image><video>", "x", {"images": ["0"]}, "it has 1 video marks for 0 videos"),
    ("<image><image>", "x", {"videos": ["v"]}, "it has 2 image marks for 0 images"),
])  # fmt: skip
def test_what_may_mean_two_things_is_refused(format, question, answer, columns, what):
    entry = said(format, question, answer, **columns)
    assert reason(format, entry).startswith(f"mark count: {what}")


@pytest.mark.parametrize("format", CHAT)
@pytest.mark.parametrize("nothing", [[None], [""], [{"bytes": None, "path": None}], ""])
def test_a_mark_for_an_image_that_is_not_there_is_refused(format, nothing):
    entry = said(format, "<image>\nWhat?", images=nothing)
    if nothing == "":  # an empty cell of a table, as of every entry that is text
        assert read(format, entry).marks_as_text == 1
    else:
        assert reason(format, entry).startswith("missing media: the text has <image>, but its list")
        noted = said(format, "What?", images=nothing, note="of <image>")  # no text of the dialogue
        assert read(format, noted).marks_as_text == 0


# ---- an image's mark for a video --------------------------------------------------------------


@pytest.mark.parametrize("format", CHAT)
@pytest.mark.parametrize(("question", "answer", "columns", "turns"), [
    ("<image>What?", "x", {"video": "v"}, ["[video]|What?", "x"]),
    ("<image><image>What?", "x", {"videos": ["v", "w"]}, ["[video]|[video]|What?", "x"]),
    ("<image>What?", "The <image> tag", {"video": "v"}, ["[video]|What?", "The <image> tag"]),
    ("<image>What?", "and <image>", {"videos": ["v", "w"]}, ["[video]|What?", "and |[video]"]),
])  # fmt: skip
def test_llava_video_s_image_is_the_video(format, question, answer, columns, turns):
    made = read(format, said(format, question, answer, **columns))
    assert lines(made) == [f"user: {turns[0]}", f"assistant: {turns[1]}"]
    assert made.unmarked == 0


def test_a_piece_and_a_column_keep_their_order():
    """A mark in an answer that is text takes no medium from the places after it."""
    entry = {"messages": [
        *openai("<image>?", "the <image> tag"),
        {"role": "user", "content": [{"type": "image", "image": "own"}, TEXT]},
        {"role": "assistant", "content": "x"}, *openai("<image>", "y"),
    ], "images": ["0", "1"]}  # fmt: skip
    made = read("messages", entry)
    assert media(made) == [("i", "0"), ("i", "own"), ("i", "1")]
    assert lines(made)[1] == "assistant: the <image> tag" and made.marks_as_text == 1


def test_columns_that_repeat_what_the_text_names_are_read_once():
    made = read("qwen_vl", qwen("<img>0</img>?") | {"images": ["0"]})
    assert media(made) == [("i", "0")]


# ---- beside what else an entry may have -------------------------------------------------------

BOXES = {"objects": {"ref": ["sheep"], "bbox": [[1, 2, 3, 4]]}}


@pytest.mark.parametrize("format", ["llava", "sharegpt", "chatml", "messages", "qwen_vl"])
@pytest.mark.parametrize(("question", "answer", "columns", "turns"), [
    ("The <ref-object> ?", "<bbox>", {"images": "0"}, ["[image]|The |<sheep>| ?", "(1,2)-(3,4)#0"]),
    # A box is in the first image, wherever that comes among the media.
    ("<image><ref-object>", "<bbox>", {"images": "0", "video": "v"},
     ["[video]|[image]|<sheep>", "(1,2)-(3,4)#1"]),
    ("<image><ref-object>", "an <image> at <bbox>", {"images": "0"},
     ["[image]|<sheep>", "an <image> at |(1,2)-(3,4)#0"]),
])  # fmt: skip
def test_objects_stand_beside_marks_that_are_mended(format, question, answer, columns, turns):
    made = read(format, said(format, question, answer, **columns, **BOXES))
    assert lines(made) == [f"user: {turns[0]}", f"assistant: {turns[1]}"]


def test_margins_go_at_media_and_stay_at_objects():
    entry = {"conversations": chat(" a <image> <bbox> <ref-object> b \n", "x"), "image": "0"}
    made = read("chatml", entry | BOXES)
    assert lines(made)[0] == "user: a|[image]|(1,2)-(3,4)#0| |<sheep>| b"


def test_boxes_of_the_text_stand_beside_images_of_a_column():
    entry = qwen("<ref>cat</ref>?<image>", "<box>(1,2),(3,4)</box>")
    assert lines(read("qwen_vl", entry | {"images": ["0"]})) == [
        "user: <cat>|?|[image]", "assistant: (1,2)-(3,4)/1000"]


@pytest.mark.parametrize("format", CHAT)
@pytest.mark.parametrize("question", ["?", "<image>?"])
def test_a_video_without_its_mark_keeps_what_is_asked_of_it(format, question):
    made = read(format, said(format, question, videos=[{"path": "v", "nframes": 4, "alt": "a"}]))
    assert lines(made)[0] == "user: [video]|?" and made.media[0].settings.nframes == 4
    assert made.unread == ("`videos` key 'alt'",)


def test_a_column_says_what_is_asked_of_an_image_in_the_text():
    entry = qwen("<img>0</img>?") | {"images": [{"path": "0", "max_pixels": 3136}]}
    made = read("qwen_vl", entry)
    assert media(made) == [("i", "0")] and made.media[0].settings.max_pixels == 3136


@pytest.mark.parametrize("format", ["sharegpt", "messages"])
@pytest.mark.parametrize(("images", "asked", "shown", "as_text"), [
    (["0", "1"], "<image>?", ["[image]|?", "[image]| of it"], 0),
    (["0"], "<image>?", ["[image]|?", "<image> of it"], 1),
    (["0"], "?", ["?", "[image]| of it"], 0),
    ([], "?", ["?", "<image> of it"], 1),
])  # fmt: skip
def test_what_a_tool_gives_may_have_marks(format, images, asked, shown, as_text):
    call = json.dumps({"name": "f", "arguments": {"x": "<image>"}})  # no mark there
    entry = {"images": images, "messages": [
        {"role": "user", "content": asked}, {"role": "tool_call", "content": call},
        {"role": "tool", "content": "<image> of it"}, {"role": "assistant", "content": "x"},
    ]}  # fmt: skip
    made = read(format, entry)
    assert [lines(made)[0], lines(made)[2]] == [f"user: {shown[0]}", f"tool: {shown[1]}"]
    assert made.marks_as_text == as_text and made.turns[1].calls[0].arguments == '{"x": "<image>"}'


@pytest.mark.parametrize("turn", [
    {"role": "tool_call", "content": [{"type": "image", "image": "0", "name": "f"}]},
    {"role": "tool_call", "content": [{"type": "image", "name": "f"}]},
])
def test_a_call_that_looks_like_an_image_takes_none(turn):
    entry = {"images": ["1"], "messages": [*openai("<image>?"), turn]}
    made = read("messages", entry)
    assert media(made) == [("i", "1")] and made.turns[1].calls[0].name == "f"


# ---- the whole command ------------------------------------------------------------------------


def prepared(tmp_path, capsys, entries, *words):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "in" / "0.png")
    (tmp_path / "in" / "data.json").write_text(json.dumps(entries))
    code = run(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--split", "1,0,0",
                "--quiet", *words])
    return code, capsys.readouterr()


MARKED = [
    said("llava", "<image>\nWhat?", image="0.png"),
    said("llava", "What?", image="0.png"),
    said("llava", "What is <image> in HTML?"),
]


def test_what_does_not_pair_off_is_counted(tmp_path, capsys):
    code, printed = prepared(tmp_path, capsys, MARKED)
    assert code == 0 and "kept 3 samples" in printed.out
    assert "entries with images or videos but no mark for them: 1; they were put" in printed.out
    assert "for want of images or videos: 1, such as entry 2 of data.json" in printed.out


def test_strict_marks_refuse_what_does_not_pair_off(tmp_path, capsys):
    code, printed = prepared(tmp_path, capsys, MARKED, "--marks", "strict")
    assert code == 0 and "kept 1 samples" in printed.out and "2 x mark count" in printed.out
    refused = (tmp_path / "out/refused.jsonl").read_text()
    assert "1 of its images and videos have no mark; write <image>" in refused
    assert "it has no image or video for 1 marks" in refused


def test_images_under_a_key_that_is_not_read_are_no_text(tmp_path, capsys):
    entries = [said("llava", "<image>\nWhat?", img="0.png")] * 3
    code, printed = prepared(tmp_path, capsys, entries)
    assert code == 2 and "3 of 3 entries have <image>" in printed.err
    assert "such as --columns images=KEY (not read: entry key 'img' in 3 entries)." in printed.err
    code = run(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--split", "1,0,0",
                "--columns", "images=img", "--quiet"])
    assert code == 0


def test_an_unknown_way_with_marks_is_refused(tmp_path, capsys):
    code, printed = prepared(tmp_path, capsys, MARKED, "--marks", "loose")
    assert code == 2 and "--marks is 'loose'; it must be one of: mend, strict" in printed.err
