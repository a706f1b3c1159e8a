"""Dialogues with tools: every way of writing one, and what a chat template makes of it."""

import json

import pytest
from raw_entries import read, reason

from megatron_vl.cli.main import run
from megatron_vl.data.conversation import BadEntry, from_json, to_json
from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.data.options import TrainedText
from megatron_vl.models import family

# Qwen2.5's and Qwen3-VL's way of writing tools (Hermes'), for content that is text or a list.
TEMPLATE = """\
{%- macro say(content) %}{% if content is string %}{{ content }}{% else %}\
{% for c in content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ say(messages[0].content) }}

{% endif %}# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ say(messages[0].content) }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) -%}
<|im_start|>{{ m.role }}
{{ say(m.content) }}<|im_end|>
{% elif m.role == 'assistant' -%}
<|im_start|>assistant
{{ say(m.content) }}{% for call in m.tool_calls %}\
{{ '\\n' if not loop.first or m.content }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ say(m.content) }}
</tool_response>{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOL = {"name": "weather", "description": "天气", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}
AS_TEXT = json.dumps([TOOL])
WRAPPED = {"type": "function", "function": TOOL}
CALLS = [{"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "北京")]
ANSWER = "Oslo is colder."


def _sharegpt(call, gives):
    """LLaMA-Factory's roles, and ms-swift's, by `from` and `value`."""
    def entry(tools=AS_TEXT, merged=True):
        calls = [json.dumps(CALLS, ensure_ascii=False)] if merged else map(json.dumps, CALLS)
        return {"tools": tools, "conversations": [
            {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Let me see."},
            *({"from": call, "value": one} for one in calls),
            {"from": gives, "value": "-3"}, {"from": gives, "value": '{"t": 9}'},
            {"from": "gpt", "value": ANSWER}]}
    return entry


def _openai(as_text=True, content="Let me see."):
    arguments = json.dumps if as_text else dict
    calls = [{"id": f"c{n}", "type": "function",
              "function": {"name": call["name"], "arguments": arguments(call["arguments"])}}
             for n, call in enumerate(CALLS)]
    return {"tools": [WRAPPED], "messages": [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": content, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c0", "content": "-3"},
        {"role": "tool", "tool_call_id": "c1", "content": '{"t": 9}'},
        {"role": "assistant", "content": ANSWER}]}


ENTRIES = {
    "LLaMA-Factory": ("sharegpt", _sharegpt("function_call", "observation")()),
    "ms-swift": ("sharegpt", _sharegpt("tool_call", "tool_response")(merged=False)),
    "ms-swift, tools as a list": ("llava", _sharegpt("tool_call", "tool")([TOOL], merged=False)),
    "tools each as text": ("chatml", _sharegpt("tool_call", "tool")([json.dumps(TOOL)])),
    "OpenAI": ("messages", _openai()),
    "OpenAI, arguments as an object": ("messages", _openai(as_text=False)),
    "OpenAI in ShareGPT": ("sharegpt", _openai()),
    "OpenAI, content as a list": ("messages", _openai(content=[{"type": "text",
                                                                "text": "Let me see."}])),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_tools(hf_dir, spec):
    """The tiny model's tokenizer with a template that has tools."""
    tokenizer = ChatTokenizer.from_hf_dir(hf_dir, tokens=spec.tokens).tokenizer
    tokenizer.chat_template = TEMPLATE

    def make(**options):
        return ChatTokenizer(tokenizer, tokens=spec.tokens, trained=TrainedText(**options))
    return make


def _said(chat, labels):
    return chat.tokenizer.decode(labels[labels != IGNORE])


@pytest.mark.parametrize("name", ENTRIES)
def test_every_way_of_writing_them_is_one_dialogue(with_tools, name):
    format, entry = ENTRIES[name]
    made = read(format, entry)
    assert json.loads(made.tools) == [WRAPPED] and made.unread == ()
    turns, _, tools = from_json(json.loads(to_json(made.turns, (), made.tools)))
    assert (turns, tools) == (made.turns, made.tools)
    chat = with_tools()
    tokens, labels = chat.encode(turns, [], tools)
    # As transformers writes it.
    want = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where?"},
         {"role": "assistant", "content": "Let me see.",
          "tool_calls": [{"type": "function", "function": call} for call in CALLS]},
         {"role": "tool", "content": "-3"}, {"role": "tool", "content": '{"t": 9}'},
         {"role": "assistant", "content": ANSWER}],
        tools=[WRAPPED], tokenize=False,
    )
    assert chat.tokenizer.decode(tokens) == want and "天气" in want and "北京" in want
    first = "".join(f"\n<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
                    for call in CALLS)
    assert _said(chat, labels) == f"Let me see.{first}<|im_end|>{ANSWER}<|im_end|>"


def test_what_a_tool_gives_is_never_trained(with_tools):
    format, entry = ENTRIES["OpenAI"]
    made = read(format, entry)
    chat = with_tools(train_on_prompt=True)
    _, labels = chat.encode(made.turns, [], made.tools)
    said = _said(chat, labels)
    assert "-3" not in said and '"t": 9' not in said and "tool_response" not in said
    assert "Where?" in said and ANSWER in said and "tool_call" in said
    chat = with_tools(mask_history=True)
    _, labels = chat.encode(made.turns, [], made.tools)
    assert _said(chat, labels) == f"{ANSWER}<|im_end|>"


def test_a_call_may_say_nothing_and_be_the_answer(with_tools):
    entry = {"conversations": [{"from": "human", "value": "Where?"},
                               {"from": "function_call", "value": json.dumps(CALLS[0])}]}
    made = read("sharegpt", entry | {"tools": json.dumps([WRAPPED])})
    assert read("messages", {"tools": [TOOL], "messages": [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": None, "function_call": CALLS[0]}]}) == made
    chat = with_tools()
    _, labels = chat.encode(made.turns, [], made.tools)
    assert _said(chat, labels).startswith('<tool_call>\n{"name": "weather"')


def test_a_call_may_be_kept_from_training(with_tools):
    format, entry = ENTRIES["OpenAI"]
    entry = json.loads(json.dumps(entry))
    entry["messages"][1]["weight"] = 0
    made = read(format, entry)
    chat = with_tools()
    assert _said(chat, chat.encode(made.turns, [], made.tools)[1]) == f"{ANSWER}<|im_end|>"


@pytest.mark.parametrize(("role", "tag"), [("ask", "function_tag"), ("give", "observation_tag")])
def test_a_dataset_names_its_roles_and_its_column(role, tag):
    entry = {"functions": json.dumps([TOOL]), "conversations": [
        {"from": "human", "value": "?"},
        {"from": "ask" if tag == "function_tag" else "tool_call", "value": json.dumps(CALLS[0])},
        {"from": "give" if tag == "observation_tag" else "tool", "value": "-3"},
        {"from": "gpt", "value": "x"}]}
    made = read("sharegpt", entry, tools="functions", **{tag: role})
    assert [turn.role for turn in made.turns] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(made.tools) == [WRAPPED] and made.turns[1].calls[0].name == "weather"


@pytest.mark.parametrize(("entry", "missing"), [
    (ENTRIES["OpenAI"], "tools"),
    (("sharegpt", {"tools": json.dumps([TOOL]), "conversations": [
        {"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]}), "tools"),
    (("messages", _openai() | {"tools": None}), "tool_calls"),
    (("sharegpt", {"conversations": [
        {"from": "human", "value": "?"}, {"from": "gpt", "value": "Call it."},
        {"from": "observation", "value": "-3"}, {"from": "gpt", "value": "x"}]}), "tool"),
])  # fmt: skip
def test_a_template_without_tools_refuses_them_in_one_sentence(hf_dir, spec, entry, missing):
    made = read(*entry)
    chat = ChatTokenizer.from_hf_dir(hf_dir, tokens=spec.tokens, family=family(spec.model_type))
    with pytest.raises(BadEntry, match=f"it has tools, but the model's chat template has no "
                                       f"`{missing}`; take a model whose") as caught:
        chat.encode(made.turns, [], made.tools)
    assert caught.value.reason == "chat template"


@pytest.mark.parametrize("tokenizer", [False, True])
def test_prepare_says_that_a_template_may_not_have_them(tmp_path, capsys, hf_dir, tokenizer):
    (tmp_path / "in.json").write_text(json.dumps([_openai(), *[{"messages": [
        {"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]}] * 2]))
    words = ["--tokenizer", str(hf_dir), "--max-length", "999"] if tokenizer else []
    assert run(["prepare", str(tmp_path / "in.json"), str(tmp_path / "out"), "--format", "messages",
                "--split", "1,0,0", "--quiet", *words]) == 0
    shown = capsys.readouterr().out
    assert ("entries that call functions: 1, such as entry 0 of in.json" in shown) != tokenizer
    assert ("1 x chat template" in shown) == tokenizer


def test_a_call_may_be_written_in_pieces():
    pieces = [{"type": "text", "text": '{"name": '}, {"type": "text", "text": '"f"}'}]
    entry = {"messages": [{"role": "user", "content": "?"},
                          {"role": "tool_call", "content": pieces}]}
    assert read("messages", entry).turns[1].calls[0].name == "f"


def _call(value, tools=None):
    turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": value}]
    return {"conversations": turns, "tools": tools}


@pytest.mark.parametrize(("entry", "what"), [
    (_call("weather(Oslo)"), "wrong shape: the call in turn 2 is not valid JSON"),
    (_call('{"name": "f", "arguments": {"a": NaN}}'), "wrong shape: the call in turn 2 is not val"),
    (_call("[]"), "wrong shape: turn 2 calls no function"),
    (_call("7"), "wrong shape: turn 2 calls a function without a `name`"),
    (_call('{"name": "", "arguments": {}}'), "wrong shape: turn 2 calls a function without a `na"),
    (_call('{"name": "f", "arguments": [1]}'), "wrong shape: the `arguments` of 'f' in turn 2 are"),
    (_call('{"name": "f", "arguments": "x"}'), "wrong shape: the `arguments` of 'f' in turn 2 is"),
    (_call('{"name": "f\\ud800"}'), "bad text"),
    (_call('{"name": "<|image_pad|>"}'), "reserved mark: turn 2"),
    (_call('{"name": "f"}', "no JSON"), "wrong shape: its `tools` is not valid JSON"),
    (_call('{"name": "f"}', [{"nome": "f"}]), "wrong shape: its `tools` is no list of functions"),
    (_call('{"name": "f"}', [{"name": "<|video_pad|>"}]), "reserved mark: its `tools` holds"),
    ({"conversations": [*_call("x")["conversations"][:1], {"from": "gpt", "value": "a"},
                        {"from": "tool_call", "value": '{"name": "f"}', "loss": False}]},
     "not served: turn 3 is a call that belongs to the answer before it"),
    ({"messages": [{"role": "user", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
                   {"role": "assistant", "content": "a"}]},
     "not served: turn 1 of user calls a function; calls are answers'"),
    (_call('{"name": "f"}', "[" * 300 + "]" * 300), "wrong shape: its `tools` is not valid JSON"),
])  # fmt: skip
def test_calls_that_cannot_be_read_say_why(entry, what):
    assert reason("sharegpt", entry).startswith(what)
