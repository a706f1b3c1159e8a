"""Conversations as a known template writes them, against what transformers renders."""

import random

import pytest
from transformers import AutoTokenizer

from megatron_vl.data.conversation import BadEntry, Part, Turn
from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.data.encode.template import ChatTemplate
from megatron_vl.data.options import TrainedText
from megatron_vl.errors import InputError
from megatron_vl.models import family

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


@pytest.mark.parametrize("source", [
    "{{ messages|length }}{% for m in messages %}{{ m.role }}{% endfor %}",
    "{% for m in messages|reverse %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{{ m.role }}{% endfor %}"
    "{% if add_generation_prompt %}a prompt that is in no answer{% endif %}",
])
def test_a_template_whose_text_does_not_grow_is_refused(another, source):
    turns = _turns("turns", lambda: "a")
    with pytest.raises(InputError, match="does not write a conversation turn after turn"):
        ChatTemplate(another(source)).write(turns)


def test_an_answer_that_cannot_be_found_is_refused(another):
    source = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(BadEntry, match="begins with an answer, and where that begins cannot"):
        ChatTemplate(another(source)).write(_turns("an answer alone", lambda: "a"))
