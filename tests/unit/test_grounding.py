"""Objects in images: from ms-swift's and Qwen-VL's entries to numbers, and to a model's words."""

import json
import tarfile
from dataclasses import replace

import pytest
import torch
from PIL import Image
from raw_entries import chat, lines, openai, qwen, read, reason, talk

from megatron_vl.cli.main import run
from megatron_vl.data.conversation import BadEntry, Box, Part, Turn, from_json, to_json
from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.model import ModelEncoder
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.models import family, load_spec
from megatron_vl.models.media import StoredMedia

ASKED = "<image>Find the <ref-object>"


def _entry(*said, ref=("sheep",), bbox=(), **objects):
    images = [f"{n}.png" for n in range("".join(said).count("<image>"))]
    return {"messages": openai(*said), "images": images,
            "objects": {"ref": list(ref), "bbox": list(bbox), **objects}}


@pytest.mark.parametrize("format", ["sharegpt", "llava", "chatml", "messages"])
@pytest.mark.parametrize(("entry", "said"), [
    (_entry(ASKED, "<bbox><bbox>.", bbox=[[90.9, 160.8, 135, 212.8], [1, 2, 3, 4]]),
     ["user: [image]|Find the |<sheep>", "assistant: (90.9,160.8)-(135,212.8)#0|(1,2)-(3,4)#0|."]),
    (_entry("<image>?", "<ref-object><bbox> and <ref-object><bbox>", ref=["a", "b"],
            bbox=[[0, 0, 0.5, 1], [0.25, 0, 1, 1]], bbox_type="norm1"),
     ["user: [image]|?", "assistant: <a>|(0,0)-(0.5,1)/1#0| and |<b>|(0.25,0)-(1,1)/1#0"]),
    (_entry("<image><image>?", "<bbox><bbox><bbox>", ref=[], image_id=[1, 0],
            bbox=[[1, 2, 3, 4], [5, 6], [1, 2, 3, 2, 3, 4, 1, 4]], bbox_type="real"),
     ["user: [image]|[image]|?", "assistant: (1,2)-(3,4)#1|(5,6)#0|(1,2)-(3,2)-(3,4)-(1,4)#0"]),
    # Corners the wrong way round are the same box.
    (_entry("<image>?", "<bbox>", ref=[], bbox=[[3, 2, 1, 4]]),
     ["user: [image]|?", "assistant: (1,2)-(3,4)#0"]),
    (_entry("<image>?", "Yes.", ref=[]), ["user: [image]|?", "assistant: Yes."]),
    # Without objects a question may speak of a mark.
    ({"messages": openai("Answer as <bbox>.", "ok")}, ["user: Answer as <bbox>.", "assistant: ok"]),
    # Without a mark they are others' notes, and no place is missed.
    ({"messages": openai("a", "b"), "objects": ["cat"]}, ["user: a", "assistant: b"]),
    ({"messages": openai("a", "b"), "objects": {"bbox": [[1, 2, 3, 4]], "category": [3]}},
     ["user: a", "assistant: b"]),
    ({"messages": openai("a", "b"), "objects": None}, ["user: a", "assistant: b"]),
])  # fmt: skip
def test_marks_are_the_places_of_objects(format, entry, said):
    assert lines(read(format, entry)) == said
    written = entry | {"objects": json.dumps(entry.get("objects"))}  # as a table has it
    assert lines(read(format, written)) == said


def test_objects_are_counted_among_the_images_not_the_videos():
    entry = talk({"type": "video", "video": "a.mp4"}, {"type": "image", "image": "0.png"},
                 {"type": "text", "text": "<bbox>?"}, objects={"bbox": [[1, 2, 3, 4]]})
    assert lines(read("messages", entry))[0] == "user: [video]|[image]|(1,2)-(3,4)#1|?"


@pytest.mark.parametrize(("entry", "what"), [
    (_entry("?", "<bbox>", ref=[]), "mark count: it has 1 marks <bbox> for 0 in the `bbox` of it"),
    (_entry(ASKED, "<bbox>", ref=[], bbox=[[1, 2, 3, 4]]), "mark count: it has 1 marks <ref-obje"),
    (_entry(ASKED, "x", bbox=[[1, 2, 3, 4]]), "mark count: it has 0 marks <bbox> for 1"),
    ({"messages": openai("?", "<ref-object>")}, "mark count: it has 1 marks <ref-object> for 0"),
    (_entry(ASKED, "<bbox>", bbox=[[1, 2, 3]]), "bad box: a `bbox` of its `objects` is '[1, 2"),
    (_entry(ASKED, "<bbox>", bbox=[[1, 2, 3, True]]), "bad box"),
    (_entry(ASKED, "<bbox>", bbox=["1,2,3,4"]), "bad box"),
    (_entry(ASKED, "<bbox>", bbox=[[1, 2, 3, float("nan")]]), "bad box"),
    (_entry(ASKED, "<bbox>", bbox=[[0, 0, 1, 1.2]], bbox_type="norm1"),
     "bad box: it has the box (0,0),(1,1.2), which is not within (0,0) and (1,1)"),
    (_entry(ASKED, "<bbox>", bbox=[[1, 2, 3, 4]], bbox_type="norm1000"), "not served: the `bbox_t"),
    (_entry(ASKED, "<bbox>", bbox=[[1, 2, 3, 4]], image_id=[0, 0]),
     "bad box: the `image_id` of its `objects` has 2 images for 1 boxes"),
    (_entry(ASKED, "<bbox>", bbox=[[1, 2, 3, 4]], image_id=[1]), "bad box: box 0 of its `objects`"),
    (_entry(ASKED, "<bbox>", bbox={"a": 1}, ref="sheep") | {"objects": {"bbox": {"a": 1}}},
     "wrong shape: the `bbox` of its `objects` is an object, no list"),
    (_entry(ASKED, "x", ref=[7]), "wrong shape: the `ref` of its `objects` is no list of texts"),
    (_entry(ASKED, "x") | {"objects": [{"caption": "a"}]}, "wrong shape: its `objects` is a list"),
    (_entry(ASKED, "x") | {"objects": "{"}, "wrong shape: its `objects` is not valid JSON"),
    (_entry(ASKED, "x", ref=["<|image_pad|>"]), "reserved mark: turn 1"),
])  # fmt: skip
def test_objects_that_cannot_be_placed_say_why(entry, what):
    assert reason("sharegpt", entry).startswith(what)


# ---- in shards and in tokens --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(hf_dir, spec):
    return ChatTokenizer.from_hf_dir(hf_dir, tokens=spec.tokens, family=family(spec.model_type))


def _turns(*parts):
    return (Turn(role="user", parts=(Part(text="?"),)), Turn(role="assistant", parts=parts))


@pytest.mark.parametrize(("parts", "said"), [
    ([Part(ref="the cat"), Part(box=Box(points=((64, 48), (320, 240)), size=(640, 480)))],
     "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(100,100),(500,500)<|box_end|>"),
    # ms-swift rounds, half to even; the right and lower edge are in the last thousandth.
    ([Part(text="at "), Part(box=Box(points=((0.0625, 0.0005), (1, 0.9996)), size=(1, 1)))],
     "at <|box_start|>(62,0),(999,999)<|box_end|>"),
    ([Part(box=Box(points=((29, 30),), size=(1000, 1000))), Part(text=".")],
     "<|box_start|>(29,30)<|box_end|>."),
    ([Part(box=Box(points=((0, 0), (9, 0), (9, 9), (0, 9)), size=(10, 10)))],
     "<|quad_start|>(0,0),(900,0),(900,900),(0,900)<|quad_end|>"),
])  # fmt: skip
def test_qwen2_vl_s_words_for_objects_are_those_that_older_shards_hold(tokenizer, parts, said):
    turns, media, tools = from_json(json.loads(to_json(_turns(*parts), ())))
    assert (turns, media, tools) == (_turns(*parts), (), "")
    tokens, labels = tokenizer.encode(turns, [])
    older = tokenizer.encode(_turns(Part(text=said)), [])
    assert torch.equal(tokens, older[0]) and torch.equal(labels, older[1])
    assert f"\n{said}<|im_end|>" in tokenizer.tokenizer.decode(tokens)


SHEEP = Part(ref="sheep")
IMAGE, VIDEO = Part(media="image"), Part(media="video")


def _at(*points, size=(1000, 1000), image=None):
    return Part(box=Box(points=points, size=size, image=image))


A, B = _at((100, 200), (300, 400)), _at((0, 0), (1000, 1000))  # of an image of 84 x 112 pixels
IN_JSON = [  # a question, an answer, and what both become
    # QwenLM's process_bbox.ipynb: rounded, and at most the last pixel.
    ((IMAGE, "?"), (SHEEP, A), "?", '{"bbox_2d": [8, 22, 25, 45], "label": "sheep"}'),
    ((IMAGE, "?"), ("A ", SHEEP, A, " and ", Part(ref="羊"), B, "."), "?",
     'A {"bbox_2d": [8, 22, 25, 45], "label": "sheep"} and {"bbox_2d": [0, 0, 83, 111], '
     '"label": "羊"}.'),
    # A name in the question alone; and it is text where it stands.
    ((IMAGE, "Find the ", SHEEP), (A, B), "Find the sheep",
     '[\n\t{"bbox_2d": [8, 22, 25, 45], "label": "sheep"},\n\t{"bbox_2d": [0, 0, 83, 111], '
     '"label": "sheep"}\n]'),
    ((IMAGE, SHEEP, " or ", Part(ref="cow")), (A,), "sheep or cow", '{"bbox_2d": [8, 22, 25, 45]}'),
    ((IMAGE, SHEEP, A, "?"), (B,), '{"bbox_2d": [8, 22, 25, 45], "label": "sheep"}?',
     '{"bbox_2d": [0, 0, 83, 111]}'),
    ((IMAGE, "?"), (_at((640, 480), size=(1280, 720)),), "?", '{"point_2d": [42, 75]}'),
    # Of two images, the second one, which becomes 56 x 84 pixels; a video is none.
    ((VIDEO, IMAGE, "?"), (A,), "?", '{"bbox_2d": [8, 22, 25, 45]}'),
    ((IMAGE, IMAGE, "?"), (_at((5, 10), (20, 40), size=(40, 80), image=1),), "?",
     '{"bbox_2d": [7, 10, 28, 42]}'),
]


@pytest.fixture(scope="module")
def window_model(window_model_dir):
    spec = load_spec(window_model_dir)
    return ModelEncoder.from_hf_dir(window_model_dir, spec, family(spec.model_type))


def _said_by(model, *turns):
    """The text, and what of it is trained, of two turns with media of 90 x 120 and of 40 x 80
    pixels, the image first."""
    asked, answer = (tuple(Part(text=one) if isinstance(one, str) else one for one in turn)
                     for turn in turns)
    kinds, sizes = [part.media for part in asked if part.media], [(90, 120), (40, 80)]
    if kinds[0] == "video":
        sizes.reverse()
    media = [StoredMedia(kind=kind, files=("0",), width=width, height=height, num_frames=4)
             for kind, (width, height) in zip(kinds, sizes, strict=False)]
    turns = (Turn(role="user", parts=asked), Turn(role="assistant", parts=answer))
    turns, media, _ = from_json(json.loads(to_json(turns, tuple(media))))
    tokens, labels, _ = model.encode(turns, media)
    tokenizer = model.chat.tokenizer
    return tokenizer.decode(tokens), tokenizer.decode(labels[labels != IGNORE])


@pytest.mark.parametrize(("asked", "parts", "question", "said"), IN_JSON)
def test_qwen2_5_vl_s_objects_are_json_in_pixels_of_the_resized_image(
        window_model, asked, parts, question, said):
    text, answer = _said_by(window_model, asked, parts)
    assert answer == f"{said}<|im_end|>"
    assert f"<|vision_end|>{question}<|im_end|>" in text


@pytest.mark.parametrize(("asked", "parts", "what"), [
    ((IMAGE, IMAGE), (A,), "a box that does not say which of its 2 images it is in"),
    ((VIDEO,), (A,), "a box that does not say which of its 0 images it is in"),
    ((IMAGE,), (_at((0, 0), (9, 0), (9, 9), (0, 9)),), "a place with four corners"),
])
def test_what_json_cannot_say_leaves_the_sample_out(window_model, asked, parts, what):
    with pytest.raises(BadEntry, match=what) as caught:
        _said_by(window_model, asked, parts)
    assert caught.value.reason == "not served"


@pytest.mark.parametrize(("change", "what"), [
    ({"grounding": None}, "but the model's family has no form for them"),
    ({"box": ("<here>", "</here>")}, "the model's tokenizer has no <here>"),
])  # fmt: skip
def test_a_model_without_words_for_objects_leaves_the_sample_out(tokenizer, spec, change, what):
    form = spec.tokens.grounding
    tokens = replace(spec.tokens, **change) if "grounding" in change else replace(
        spec.tokens, grounding=replace(form, **change))
    chat = ChatTokenizer(tokenizer.tokenizer, tokens=tokens)
    turns = _turns(Part(box=Box(points=((1, 2), (3, 4)), size=(10, 10))))
    with pytest.raises(BadEntry, match=what) as caught:
        chat.encode(turns, [])
    assert caught.value.reason == "not served"


def test_boxes_in_pixels_get_their_image_s_size_and_only_a_wrong_one_costs_its_entry(
        tmp_path, tokenizer, capsys):
    source = tmp_path / "in"
    source.mkdir()
    Image.new("RGB", (40, 30)).save(source / "0.png")
    entries = [_entry("<image>Where?", "<bbox>", ref=[], bbox=[box])
               for box in ([4, 3, 40, 30], [40, 30, 4, 3], [4, 3, 41, 30])]
    (source / "a.json").write_text(json.dumps(entries))
    assert run(["prepare", str(source), str(tmp_path / "out"), "--format", "sharegpt", "--split",
                "1,0,0", "--no-shuffle", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert ("1 x bad box, such as: it has the box (4,3),(41,30), which is not within (0,0) and "
            "(40,30)") in shown
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        texts = [tar.extractfile(m).read().decode() for m in tar if m.name.endswith("json")]
    assert len(texts) == 2 and not any("<|" in text or "bbox" in text for text in texts)
    for text in texts:
        turns, _, _ = from_json(json.loads(text))
        assert turns[1].parts[0].box.image == 0
        said = tokenizer.tokenizer.decode(tokenizer.encode(turns, [4])[0])
        assert "<|box_start|>(100,100),(999,999)<|box_end|><|im_end|>" in said


def test_qwen_vl_s_own_entries_are_the_same():
    one = read("qwen_vl", qwen("Where?", "<ref>sheep</ref><box>(1,2),(3,4)</box>"))
    entry = {"conversations": chat("Where?", "<ref-object><bbox>"), "objects": {
        "ref": ["sheep"], "bbox": [[0.001, 0.002, 0.003, 0.004]], "bbox_type": "norm1"}}
    assert lines(one) == ["user: Where?", "assistant: <sheep>|(1,2)-(3,4)/1000"]
    assert lines(read("llava", entry)) == [
        "user: Where?", "assistant: <sheep>|(0.001,0.002)-(0.003,0.004)/1"]
