"""Conversations as a known template writes them, against what transformers renders."""

import json
import random
import shutil
from functools import partial

import pytest
from transformers import AutoTokenizer

from megatron_vl.data.conversation import BadEntry, Call, Part, Turn
from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.data.encode.template import ChatTemplate
from megatron_vl.data.options import TrainedText
from megatron_vl.errors import InputError
from megatron_vl.models import family, load_spec

MASKS = {
    "answers": TrainedText(),
    "all": TrainedText(train_on_prompt=True),
    "last answer": TrainedText(mask_history=True),
}
SHAPES = {
    "text": ("user", "assistant"),
    "an image": ("user+image", "assistant"),
    "turns": ("system", "user+image+video", "assistant", "user", "assistant", "user", "assistant"),
    "texts side by side": ("user+text", "assistant+text"),
    "an answer first": ("assistant", "user", "assistant"),
    "an answer alone": ("assistant",),
    "a system prompt later": ("user", "system", "assistant"),
}
# What a template may change, and a tokenizer take for one of its own marks or a part of one.
WORDS = ("red", " ", "\n", "<", "<|", "<|im_", "|>", "im_end|>", "<|im_end|>", "<|endoftext|>",
         "<|im_start|>", "中文", "e\u0301", "\u0301", "assistant\n", "'s", "{{ x }}", "\u200d",
         "👍🏽")


def _turns(shape, say):
    """A conversation; `say()` gives its texts."""
    turns = []
    for turn in SHAPES[shape]:
        role, *more = turn.split("+")
        parts = [Part(text=say()) if kind == "text" else Part(media=kind) for kind in more]
        turns.append(Turn(role=role, parts=(*parts, Part(text=say()))))
    return turns


@pytest.fixture(scope="module")
def tokenizer(hf_dir, spec):
    return ChatTokenizer.from_hf_dir(hf_dir, tokens=spec.tokens).tokenizer


@pytest.fixture
def another(hf_dir):
    """Makes a tokenizer with another template, which is rendered."""
    def make(source):
        tokenizer = AutoTokenizer.from_pretrained(hf_dir)
        tokenizer.chat_template = source
        return tokenizer

    return make


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_known_template_writes_what_transformers_renders(
    tokenizer, another, spec, shape, mask, monkeypatch
):
    # A comment makes it unknown.
    rendered = another(tokenizer.chat_template + "{# #}")
    known, other = (
        ChatTokenizer(one, tokens=spec.tokens, family=family(spec.model_type),
                      trained=MASKS[mask]) for one in (tokenizer, rendered)
    )
    renderings, render = [], ChatTemplate.render
    monkeypatch.setattr(
        ChatTemplate, "render",
        lambda self, *args, **more: renderings.append(self) or render(self, *args, **more),
    )
    draw = random.Random(shape)
    for _ in range(30):
        turns = _turns(shape, lambda: "".join(draw.choices(WORDS, k=draw.randint(0, 6))))
        made = known.template.write(turns)
        assert not renderings, "it was rendered"
        assert made == other.template.write(turns)
        assert renderings.pop() and made[0] == tokenizer.apply_chat_template(
            [turn.message() for turn in turns], tokenize=False)
        renderings.clear()


def test_an_answer_is_not_taken_for_the_prompt_that_says_the_same(tokenizer, spec):
    chat = ChatTokenizer(tokenizer, tokens=spec.tokens, family=family(spec.model_type))
    turns = (Turn(role="user", parts=(Part(text="assistant\nyes"),)),
             Turn(role="assistant", parts=(Part(text="yes"),)))
    _, labels = chat.encode(turns, [])
    assert tokenizer.decode(labels[labels != IGNORE]) == "yes<|im_end|>"


@pytest.fixture(scope="module")
def thinking(qk_norm_model_dir):
    """Makes the chat tokenizer of Qwen3, whose text does not grow turn by turn."""
    spec = load_spec(qk_norm_model_dir)
    return partial(ChatTokenizer.from_hf_dir, qk_norm_model_dir, tokens=spec.tokens,
                   family=family(spec.model_type))


def _say(role, text, *calls):
    return Turn(role=role, parts=(Part(text=text),), calls=calls)


EMPTY, MINE = "<think>\n\n</think>\n\n", "<think>\nOne and one.\n</think>\n\n"
ASKED, AGAIN = _say("user", "1 + 1?"), _say("user", "Sure?")
CALL = Call(name="add", arguments='{"a": 1}')
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = json.dumps([{"type": "function", "function": {"name": "add", "parameters": {}}}])
THINKING = {  # turns, whether the last prompt is of one that does not think, and what is trained
    "one turn": ([ASKED, _say("assistant", "2")], True, ["2"]),
    "one turn, with reasoning": ([ASKED, _say("assistant", f"{MINE}2")], False, [f"{MINE}2"]),
    "one turn, with empty reasoning": ([ASKED, _say("assistant", f"{EMPTY}2")], True, ["2"]),
    "turns": ([_say("system", "Add."), ASKED, _say("assistant", "2"), AGAIN,
               _say("assistant", "2")], True, ["2", "2"]),
    "turns, with reasoning": ([ASKED, _say("assistant", f"{MINE}2"), AGAIN,
                               _say("assistant", f"{MINE}yes")], False, ["2", f"{MINE}yes"]),
    "turns, the first with reasoning": ([ASKED, _say("assistant", f"{MINE}2"), AGAIN,
                                         _say("assistant", "yes")], True, ["2", "yes"]),
    "tools": ([ASKED, _say("assistant", "", CALL), _say("tool", "2"), _say("assistant", "2"), AGAIN,
               _say("assistant", "yes")], True, [CALLED, "2", "yes"]),
    "tools, with reasoning": ([ASKED, _say("assistant", MINE, CALL), _say("tool", "2"),
                               _say("assistant", f"{MINE}2")], False,
                              [f"{MINE}{CALLED}", f"{MINE}2"]),
    "a call alone": ([ASKED, _say("assistant", "", CALL)], True, [CALLED]),
    "answers side by side": ([ASKED, _say("assistant", "2"), _say("assistant", f"{MINE}yes")],
                             False, ["2", f"{MINE}yes"]),
}


@pytest.mark.parametrize("shape", THINKING)
def test_what_a_thinking_template_writes_before_an_answer_is_no_answer(thinking, shape):
    turns, without, answers = THINKING[shape]
    tools = TOOLS if "tool" in shape or "call" in shape else ""
    chat = thinking()
    functions = json.loads(tools) if tools else None
    render = partial(chat.tokenizer.apply_chat_template, tools=functions, tokenize=False)
    tokens, labels = chat.encode(turns, [], tools)
    text, spans = chat.template.write(turns, tools)
    assert chat.tokenizer.decode(tokens) == text == render(chat.template.messages(turns))
    assert [text[begin:end] for begin, end in spans] == [f"{one}<|im_end|>" for one in answers]
    assert chat.tokenizer.decode(labels[labels != IGNORE]) == "".join(
        f"{one}<|im_end|>" for one in answers)
    if turns[-2].role == "user":  # the last prompt is what the model is served with
        assert text[: spans[-1][0]] == render(
            chat.template.messages(turns[:-1]), add_generation_prompt=True,
            enable_thinking=not without)
    last = thinking(trained=TrainedText(mask_history=True)).template
    assert last.write(turns, tools) == (text, spans[-1:])


def test_of_a_template_that_thinks_only_where_it_is_asked_to_the_reasoning_is_found(thinking):
    tokenizer, (turns, _, answers) = thinking().tokenizer, THINKING["one turn, with reasoning"]
    source = tokenizer.chat_template
    tokenizer.chat_template = source.replace(
        "enable_thinking is defined and enable_thinking is false", "not enable_thinking")
    assert tokenizer.chat_template != source
    text, ((begin, end),) = ChatTemplate(tokenizer, text_only=True).write(turns)
    assert text[begin:end] == f"{answers[0]}<|im_end|>"


def test_an_answer_that_the_template_leaves_out_costs_its_sample(thinking):
    turns = [ASKED, _say("assistant", MINE), AGAIN, _say("assistant", "yes")]
    with pytest.raises(BadEntry, match="leaves out all that the answer in turn 2 says") as caught:
        thinking().encode(turns, [])
    assert caught.value.reason == "chat template"


LOST = {
    "no text": "{{ messages|length }}{% for m in messages %}{{ m.role }}{% endfor %}",
    "twice": "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.content }}{% endfor %}",
    "the last alone": "{{ messages[-1].role }}{{ messages[-1].content }}",
    "their length before them": "{{ (messages|map(attribute='content')|join)|length }}"
                                "{% for m in messages %}{{ m.content }}{% endfor %}",
    "one end for all": "{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>",
}


@pytest.mark.parametrize("source", LOST.values(), ids=LOST)
def test_a_template_whose_answers_cannot_be_found_is_refused(qk_norm_model_dir, source, tmp_path):
    shutil.copytree(qk_norm_model_dir, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(source)
    spec = load_spec(qk_norm_model_dir)
    with pytest.raises(InputError, match="hf cannot be trained with: the model's chat template "
                                         "does not write every answer once, in a place of its"):
        ChatTokenizer.from_hf_dir(tmp_path / "hf", tokens=spec.tokens)
