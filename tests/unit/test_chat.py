import json
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_vl.data.conversation import REASONS, BadEntry, Part, Turn
from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.data.options import TrainedText
from megatron_vl.data.raw.formats.llava import question_and_answer, split_marks
from megatron_vl.errors import InputError
from megatron_vl.models import family


@pytest.fixture(scope="module")
def chat(hf_dir, spec):
    return ChatTokenizer.from_hf_dir(hf_dir, tokens=spec.tokens, family=family(spec.model_type))


def _say(role, text):
    return Turn(role=role, parts=(Part(text=text),))


def _copy(hf_dir, out, chat_template=None):
    shutil.copytree(hf_dir, out)
    if chat_template is not None:
        (out / "chat_template.json").unlink()
        path = out / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": chat_template}))
    return out


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nWhat?", [None, "What?"]),
        ("What?\n<image>", ["What?", None]),
        ("<image>What?", [None, "What?"]),
        ("a <image>\n\nb", ["a ", None, "\nb"]),
        ("<image>\n<image>\nb", [None, None, "b"]),
        ("What?", ["What?"]),
        ("<image>", [None]),
        ("", [""]),
    ],
)
def test_a_mark_takes_the_one_line_break_beside_it(value, parts):
    assert [part.text for part in split_marks(value)] == parts


def test_the_text_is_what_the_published_template_writes(chat):
    tokens, labels = chat.encode(question_and_answer("<image>\nWhat is this?", "red"), [4])
    assert chat.tokenizer.decode(tokens) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
        "What is this?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )
    assert chat.tokenizer.decode(labels[labels != IGNORE]) == "red<|im_end|>"


def test_a_video_takes_its_tokens_where_it_stands(chat):
    turns = (Turn(role="user", parts=(Part(media="image"), Part(media="video"), Part(text="?"))),
             _say("assistant", "red"))
    tokens, _ = chat.encode(turns, [2, 3])
    assert (
        "user\n<|vision_start|>" + "<|image_pad|>" * 2 + "<|vision_end|><|vision_start|>"
        + "<|video_pad|>" * 3 + "<|vision_end|>?<|im_end|>"
    ) in chat.tokenizer.decode(tokens)


def test_the_ignored_label_is_not_the_pad_token(chat):
    _, labels = chat.encode((_say("user", "?"), _say("assistant", "<|endoftext|>")), [])
    assert chat.pad_token == chat.tokenizer.pad_token_id != IGNORE
    assert (labels == chat.pad_token).sum() == 1, "a pad token that was said is trained"


@pytest.mark.parametrize("system", ["", "Be brief.", "You are a helpful assistant.", "x " * 200])
def test_a_system_prompt_of_any_length_leaves_the_mask_right(chat, system):
    turns = (_say("system", system), _say("user", "?"), _say("assistant", "yes"))
    _, labels = chat.encode(turns, [])
    assert chat.tokenizer.decode(labels[labels != IGNORE]) == "yes<|im_end|>"


@pytest.mark.parametrize(
    ("turns", "counts", "reason", "what"),
    [
        ((_say("user", "?"), _say("assistant", " ")), [], "empty answer", "answer is empty"),
        ((_say("user", "?"),), [], "no answer", "no answer to train on"),
        ((_say("user", "<|image_pad|>"), _say("assistant", "a")), [], "mark count",
         "1 image marks for 0"),
        ((_say("user", "?"), _say("assistant", "a")), [4], "mark count",
         "0 marks for 1 images and videos"),
        ((_say("user", "<|video_pad|>?"), _say("assistant", "a")), [], "mark count",
         "1 video marks for 0"),
        # As many marks as media, but not of their kind.
        ((Turn(role="user", parts=(Part(media="image"), Part(text="<|video_pad|>"))),
          _say("assistant", "a")), [4, 4], "mark count", "1 video marks for 0"),
    ],
)
def test_a_conversation_that_cannot_be_trained_on_says_why(chat, turns, counts, reason, what):
    with pytest.raises(BadEntry, match=what) as raised:
        chat.encode(turns, counts)
    assert raised.value.reason == reason in REASONS


def test_all_text_and_only_the_last_answer_exclude_one_another():
    with pytest.raises(InputError, match="exclude one another; give one"):
        TrainedText(train_on_prompt=True, mask_history=True)


TRIMS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_of_a_template_that_changes_texts_the_changed_text_is_trained(hf_dir, spec, tmp_path):
    copy = _copy(hf_dir, tmp_path / "hf", chat_template=TRIMS)
    chat = ChatTokenizer.from_hf_dir(copy, tokens=spec.tokens)
    for answer in (" red ", "blue\n"):
        tokens, labels = chat.encode((_say("user", " ? "), _say("assistant", answer)), [])
        text = f"<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n{answer.strip()}<|im_end|>\n"
        assert chat.tokenizer.decode(tokens) == text
        assert chat.tokenizer.decode(labels[labels != IGNORE]) == f"{answer.strip()}<|im_end|>"


def test_a_template_beside_the_tokenizer_is_found(hf_dir, spec, tmp_path):
    copy = _copy(hf_dir, tmp_path / "hf", chat_template="")
    with pytest.raises(InputError, match="has no chat template"):
        ChatTokenizer.from_hf_dir(copy, tokens=spec.tokens)
    shutil.copy(hf_dir / "chat_template.json", copy)
    ChatTokenizer.from_hf_dir(copy, tokens=spec.tokens)


@pytest.mark.parametrize("text", ["{", "[]", '{"template": ""}'])
def test_a_damaged_template_beside_the_tokenizer_is_named(hf_dir, spec, tmp_path, text):
    copy = _copy(hf_dir, tmp_path / "hf", chat_template="")
    (copy / "chat_template.json").write_text(text)
    with pytest.raises(InputError, match=r"chat_template.json (cannot be used|is not valid)"):
        ChatTokenizer.from_hf_dir(copy, tokens=spec.tokens)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_tokenizer_file_is_named(hf_dir, spec, tmp_path, name):
    copy = _copy(hf_dir, tmp_path / "hf")
    (copy / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing; copy it"):
        ChatTokenizer.from_hf_dir(copy, tokens=spec.tokens)


def test_a_damaged_tokenizer_is_named(hf_dir, spec, tmp_path):
    copy = _copy(hf_dir, tmp_path / "hf")
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="the tokenizer in .* cannot be read"):
        ChatTokenizer.from_hf_dir(copy, tokens=spec.tokens)


def test_a_tokenizer_of_another_model_is_refused(hf_dir, spec):
    with pytest.raises(InputError, match="does not write config.json's image_token_id 7"):
        ChatTokenizer.from_hf_dir(hf_dir, tokens=replace(spec.tokens, image=7))


def test_positions_of_labels_are_shifted_by_one(chat):
    tokens, labels = chat.encode((_say("user", "?"), _say("assistant", "red")), [])
    trained = (labels != IGNORE).nonzero().flatten()
    assert torch.equal(labels[trained], tokens[trained + 1])
