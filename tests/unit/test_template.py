"""Conversations written in stretches, against the same text in one piece."""

import random

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from megatron_vl.data import template
from megatron_vl.data.chat import ChatTokenizer
from megatron_vl.data.conversation import Part, Turn
from megatron_vl.data.options import TrainedText
from megatron_vl.data.samples import IGNORE
from megatron_vl.data.template import ChatTemplate, Stretch

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
}
# What a tokenizer may join across an edge, or take for one of its own marks or a part of one.
WORDS = ("red", " ", "\n", "<", "<|", "<|im_", "|>", "im_end|>", "<|im_end|>", "<|endoftext|>",
         "<|im_start|>", "中文", "e\u0301", "\u0301", "assistant\n", "'s", "1234", "\u200d", "👍🏽")


def _turns(shape, say):
    """A conversation; `say()` gives its texts."""
    turns = []
    for turn in SHAPES[shape]:
        role, *more = turn.split("+")
        parts = [Part(text=say()) if kind == "text" else Part(media=kind) for kind in more]
        turns.append(Turn(role=role, parts=(*parts, Part(text=say()))))
    return turns


@pytest.fixture(scope="module")
def chat(hf_dir, spec):
    return ChatTokenizer.from_hf_dir(hf_dir, tokens=spec.tokens)


def _seen(chat, shape):
    """Shows it a conversation, whose form is made for the second; how many media it has."""
    turns = _turns(shape, lambda: "a")
    assert len(chat.template.write(turns)) == 1
    return sum(len(turn.media) for turn in turns)


def _whole(chat, turns):
    """The same conversation as one stretch."""
    template = ChatTemplate(chat.tokenizer, last_answer_only=chat.trained.mask_history,
                            everything=chat.trained.train_on_prompt)
    text, answers = template._render_with_spans(turns, [turn.message() for turn in turns])
    return Stretch(text=text, spans=tuple(answers), fixed=False)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_stretches_are_the_rendered_text_and_its_tokens(chat, shape, mask):
    chat = ChatTokenizer(chat.tokenizer, tokens=chat.tokens, trained=MASKS[mask])
    draw = random.Random(shape)
    media = _seen(chat, shape)
    for _ in range(60):
        turns = _turns(shape, lambda: "x" + "".join(draw.choices(WORDS, k=draw.randint(0, 6))))
        whole = _whole(chat, turns)
        stretches = chat.template.write(turns)
        assert "".join(stretch.text for stretch in stretches) == whole.text
        assert len(stretches) > 2 * len(SHAPES[shape]) - 2, "it was not cut"
        tokens, labels = chat._tokens(whole.text, whole.spans)
        made, trained = chat.encode(turns, [1] * media)
        assert made.tolist() == tokens
        places = {chat.tokens.image, chat.tokens.video}
        want = [IGNORE if token in places else label
                for token, label in zip(tokens, labels, strict=True)]
        assert trained.tolist() == [*want[1:], IGNORE]


def test_what_never_changes_is_the_same_object(chat):
    chat = ChatTokenizer(chat.tokenizer, tokens=chat.tokens)
    _seen(chat, "turns")
    one, two = (
        [s for s in chat.template.write(_turns("turns", text.upper)) if s.fixed] for text in "ab"
    )
    assert len(one) > 5 and all(a is b for a, b in zip(one, two, strict=True))
    assert one[0].text == "<|im_start|>"  # a system prompt is a text like others
    assert any("<|vision_start|><|image_pad|><|vision_end|>" in stretch.text for stretch in one)


def test_a_text_is_remembered_apart_as_a_prompt_and_as_an_answer(chat):
    same = "assistant\nyes"
    turns = (Turn(role="user", parts=(Part(text=same),)),
             Turn(role="assistant", parts=(Part(text="yes"),)))
    for _ in range(3):
        _, labels = chat.encode(turns, [])
        assert chat.tokenizer.decode(labels[labels != IGNORE]) == "yes<|im_end|>"


def test_little_is_remembered_of_what_was_said(chat):
    fresh = ChatTokenizer(chat.tokenizer, tokens=chat.tokens)
    for number in range(5000):
        fresh.encode(_turns("text", lambda number=number: f"{number} " + "x" * 200), [])
    before = fresh._remembered.cache_info().currsize
    assert before < 10, "texts that are long were kept"
    for number in range(5000):
        fresh.encode(_turns("text", lambda number=number: str(number)), [])
    assert fresh._remembered.cache_info().currsize == fresh._remembered.cache_info().maxsize


MARKED = ("{% for m in messages %}{{ m.role }}: {% for c in m.content %}{{ c.text }}{% endfor %}"
          "<|x|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")


@pytest.mark.parametrize(
    ("others", "flags", "said", "cut"),
    [
        ((), {}, "a  ", True),
        (("|x", "x|>"), {}, "a", True),  # that begin within it come too late
        (("<|x|>assistant: b",), {}, "a", False),  # a longer mark that begins there
        (("a<|x|>",), {}, "a", False),  # one that begins earlier, and hides it
        (("a<|",), {}, "a", False),  # or a part of it
        ((), {"lstrip": True}, "a  ", False),
        ((), {"rstrip": True}, "a  ", False),
        ((), {"single_word": True}, "a", False),
        ((), {"normalized": True}, "a", False),
    ],
)
def test_a_text_is_cut_at_marks_that_stand_whatever_is_beside_them(
    hf_dir, spec, others, flags, said, cut
):
    stretches = _written(hf_dir, spec, "<|x|>", MARKED, said, others, **flags)
    assert stretches == (
        [f"user: {said}", "<|x|>", f"assistant: {said}", "<|x|>"] if cut else
        [f"user: {said}<|x|>assistant: {said}<|x|>"]
    )


@pytest.mark.parametrize(("mark", "said", "others"), [
    ("###", "I like C#", ()),  # found one letter earlier
    ("<END", "foo", (AddedToken("foo", single_word=True, normalized=False),)),
    (" <x>", "foo", (AddedToken("foo", rstrip=True, normalized=False),)),
    ("\u0301>", "foo", (AddedToken("foo", single_word=True, normalized=False),)),
    ("\u203fx>", "foo", (AddedToken("foo", single_word=True, normalized=False),)),
])
def test_a_text_is_not_cut_at_a_mark_that_changes_with_the_text(hf_dir, spec, mark, said, others):
    assert len(_written(hf_dir, spec, mark, MARKED.replace("<|x|>", mark), said, others)) == 1


def _written(hf_dir, spec, mark, template, said, others=(), **flags):
    """The stretches' texts, whose tokens are those of the whole text."""
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken(mark, **{"normalized": False, **flags}), *(
        AddedToken(other, normalized=False) if isinstance(other, str) else other for other in others
    )])
    chat = ChatTokenizer(tokenizer, tokens=spec.tokens)
    _seen(chat, "text")
    turns = _turns("text", lambda: said)
    whole = _whole(chat, turns)
    _equal_to_whole(chat, turns, whole)
    return [stretch.text for stretch in chat.template.write(turns)]


def _equal_to_whole(chat, turns, whole):
    tokens, labels = chat.encode(turns, [])
    want, trained = chat._tokens(whole.text, whole.spans)
    assert tokens.tolist() == want
    assert labels.tolist() == [*trained[1:], IGNORE]


TOKENIZERS = {
    "first word": lambda: pre_tokenizers.Metaspace(prepend_scheme="first"),
    "every word": lambda: pre_tokenizers.Metaspace(prepend_scheme="always"),
    "no prefix": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "a prefix": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
}
CHANGES = {
    "as it is": lambda: None,
    "breaks are spaces": lambda: normalizers.Replace("\n", " "),
    "spaces are one": lambda: normalizers.Replace(Regex(r"\s+"), " "),
    "stripped": lambda: normalizers.Strip(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("trims", [True, False])
def test_tokenizers_of_every_kind_give_the_tokens_of_the_whole_text(kind, change, trims, spec):
    """Some treat the first word of all otherwise, and so the first of every stretch."""
    texts = ["red and blue", "hello world", " what is this", "user: \n<|s|>x"] * 3
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = TOKENIZERS[kind]()
    if CHANGES[change]() is not None:
        backend.normalizer = CHANGES[change]()
    if trims:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|s|>", "<|e|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|e|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|s|>{% if m.role == 'user' %} {% endif %}{% for c in m.content %}"
        "{{ c.text }}{% endfor %}<|e|>{% endfor %}{% if add_generation_prompt %}<|s|>{% endif %}")
    chat = ChatTokenizer(tokenizer, tokens=spec.tokens)
    _seen(chat, "text")
    for said in ("hello", " hello", "red and blue ", "\nx", "'s", "1"):
        turns = _turns("text", lambda said=said: said)
        _equal_to_whole(chat, turns, _whole(chat, turns))


WRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}WRITE{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("write", "remembered"),
    [
        ("{{ c.text }}", True),
        ("{{ 'a' + c.text + 'b' }}", True),
        ("{{ c['text'] }}{% if c.text is string %}.{% endif %}", True),
        ("{{ c.text if c.type == 'text' else '' }}", True),
        ("{{ c.get('text') }}", True),
        ("{% macro say(c) %}{{ c.text }}{% endmacro %}{{ say(c) }}", True),
        ("{% if 'text' in c %}{{ c.text }}{% endif %}", True),
        ("{% if loop.first and not c.image and c|length > 1 %}{{ c.text }}{% endif %}", True),
        ("{% if c is mapping and m.content|length == 1 %}{{ c.text }}{% endif %}", True),
        ("{% if m.content is string %}{{ m.content }}{% else %}{{ c.text }}{% endif %}", True),
        ("{% set n = namespace(k=0) %}{% set n.k = n.k + 1 %}{{ n.k }}{{ c.text }}", True),
        ("{% for p in m.content|selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}",
         True),
        ("{% if messages[0].role == 'system' %}.{% endif %}{{ messages[-1:] and c.text }}", False),
        ("{{ c.text }} ({{ c.text }})", False),
        ("{{ m.content|map(attribute='text')|join('')|replace('<think>', '') }}", False),
        ("{{ m.content|join('', attribute='text')|replace('<think>', '') }}", False),
        ("{% set t = m.content|selectattr('type', 'equalto', 'text')|map(attribute='text')"
         "|join('') %}{% if '</think>' in t %}T: {% endif %}{{ t }}", False),
        ("{% for p in m.content|selectattr('text') %}[{{ p.text }}]{% endfor %}", False),
        ("{% for p in m.content|unique(attribute='text') %}{{ p.text }}{% endfor %}", False),
        ("{% for p in m.content|sort(attribute='text') %}{{ p.text }}{% endfor %}", False),
        ("{{ c[c.type]|replace('b', 'c') }}", False),
        ("{{ c[c.type] }}", False),
        ("{% for k in c %}{{ c[k]|replace('b', 'c') }}{% endfor %}", False),
        ("{% for k, v in c|items %}{{ v|replace('b', 'c') }}{% endfor %}", False),
        ("{% if '</think>' in m.content|string %}T{% endif %}{{ c.text }}", False),
        ("{% if m|tojson|length > 150 %}T{% endif %}{{ c.text }}", False),
        ("{{ ('%(text)s' % c)|replace('b', 'c') }}", False),
        ("{% macro say(c) %}{{ c.text }}{% endmacro %}{% set f = say %}{{ f(c)|trim }}", False),
        ("{% macro say(x) %}{% if 'b' in x %}T{% endif %}{% endmacro %}{{ say(c.text) }}", False),
        ("{% for p in m.content recursive %}{{ p.text }}{% endfor %}", False),
        ("{% if m == messages[0] %}T{% endif %}{{ c.text }}", False),
        ("{% if loop.changed(m.content) %}T{% endif %}{{ c.text }}", False),
        ("{% if loop.previtem == c %}T{% endif %}{{ c.text }}", False),
        ("{% if loop['previtem'] and loop['previtem'].text == 'b' %}T{% endif %}{{ c.text }}",
         False),
        ("{% set l = loop %}{% if l.nextitem == c %}T{% endif %}{{ c.text }}", False),
        ("{% macro say() %}{{ varargs[0].text|trim }}{% endmacro %}{{ say(c) }}", False),
        ("{% macro say() %}{{ kwargs.c.text|trim }}{% endmacro %}{{ say(c=c) }}", False),
        ("{% if messages.index(m) %}T{% endif %}{{ c.text }}", False),
        ("{{ c.text }}{{ strftime_now('%Y') }}", False),
        ("{{ c.text }}{{ [1]|random }}", False),
        ("{{ c.text if c.text != 'a' else 'b' }}", False),
        ("{% if not c.text %}T{% endif %}{{ c.text }}", False),
        ("{% with t = c.text %}{{ t }}{% endwith %}", False),
        ("{{ c|attr('text') }}", False),
        ("{% if c.text is lower %}T{% endif %}{{ c.text }}", False),
        ("{% if m is eq(messages[0]) %}T{% endif %}{{ c.text }}", False),
        ("{% macro say(c) %}{{ c.text }}{% endmacro %}{{ say(c)|trim }}", False),
        ("{% set said = c.text %}{% if said %}{{ said }}{% endif %}", False),
        ("{% set said %}{{ c.text }}{% endset %}{{ said|trim }}", False),
        ("{% filter upper %}{{ c.text }}{% endfilter %}", False),
        ("{% for key, value in c.items() %}{% if value == 'a' %}.{% endif %}{% endfor %}", False),
        ("{% if c.get('text') == 'a' %}.{% endif %}{{ c['text'] }}", False),
        ("{{ c }}", False),
        ("{% generation %}{{ c.text }}{% endgeneration %}", False),
        ("{% if c.text %}{{ c.text }}{% endif %}", False),
        ("{% if 'http' in c.text %}web: {% endif %}{{ c.text }}", False),
        ("{% if c.text|length > 40 %}long: {% endif %}{{ c.text }}", False),
        ("{{ c.text }}{% if c.text.endswith('/no_think') %} .{% endif %}", False),
        ("{{ c.text }}{% if c.text == 'a' %} .{% endif %}", False),
        ("{{ c.text }}{% if ('x' + c.text)[1:] == 'a' %} .{% endif %}", False),
        ("{{ c.text|trim }}", False),
        ("{{ c.text.split('</think>')[-1] }}", False),
        ("{{ c.text|tojson }}", False),
        ("{{ '%s'|format(c.text) }}", False),
        ("{% for letter in c.text %}{{ letter }}{% endfor %}", False),
    ],
)
def test_only_a_template_that_does_no_more_with_texts_than_write_them_is_remembered(
    write, remembered, hf_dir, spec
):
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    tokenizer.chat_template = WRITES.replace("WRITE", write)
    chat = ChatTokenizer(tokenizer, tokens=spec.tokens)
    _seen(chat, "text")
    for said in ("b", "", "a", " b\n", "see http://a.b", "b" * 50, "b /no_think", "</think>b"):
        turns = _turns("text", lambda said=said: said)
        stretches = chat.template.write(turns)
        assert (len(stretches) > 1) == remembered
        assert "".join(stretch.text for stretch in stretches) == _whole(chat, turns).text


def test_shapes_that_come_once_leave_the_others_remembered(chat, monkeypatch):
    monkeypatch.setattr(template, "_MAX_FORMS", 4)
    chat = ChatTokenizer(chat.tokenizer, tokens=chat.tokens)
    _seen(chat, "text")
    for turns in range(2, 20):
        chat.template.write([Turn(role="user", parts=(Part(text="a"),) * turns),
                             Turn(role="assistant", parts=(Part(text="a"),))])
        assert len(chat.template.write(_turns("text", lambda: "a"))) > 1
    assert len(chat.template._forms) == 4
