"""Answers that an entry keeps from training."""

import json

import pytest
from raw_entries import chat, openai, read, reason

from megatron_vl.data.conversation import BadEntry, from_json, to_json
from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.data.options import TrainedText
from megatron_vl.models import family

SAID = ("A?", "one", "B?", "two", "C?", "three")


def _entry(format, keys):
    """A conversation of three answers, with `keys` of each."""
    turns = (openai if format == "messages" else chat)(*SAID)
    for turn, more in zip(turns[1::2], keys, strict=True):
        turn.update(more)
    return {"messages" if format == "messages" else "conversations": turns}


@pytest.mark.parametrize("format", ["llava", "sharegpt", "chatml", "messages", "qwen_vl"])
@pytest.mark.parametrize(("keys", "trained"), [
    (({"loss": False}, {"loss": True}, {}), (False, True, True)),
    (({"weight": 0}, {"weight": 1}, {"weight": None}), (False, True, True)),
    (({"weight": 0.0}, {"weight": 1.0}, {"loss_scale": 0.0}), (False, True, False)),
    (({"train": False}, {"training": False}, {}), (False, False, True)),
    (({"loss": True, "weight": 0}, {}, {}), (False, True, True)),
])  # fmt: skip
def test_keys_of_an_answer_say_whether_it_is_trained(format, keys, trained):
    made = read(format, _entry(format, keys))
    assert [t.trained for t in made.turns if t.role == "assistant"] == list(trained)
    assert made.unread == ()
    turns, _, _ = from_json(json.loads(to_json(made.turns, ())))
    assert turns == made.turns


@pytest.mark.parametrize(("turn", "keys", "what"), [
    (1, {"weight": 0.5}, "not served: turn 2 has the `weight` 0.5, but a turn is trained (1,"),
    (1, {"weight": 2}, "not served: turn 2 has the `weight` 2"),
    (1, {"loss": "false"}, "not served: turn 2 has the `loss` 'false'"),
    (1, {"loss_scale": [0, 1]}, "not served: turn 2 has the `loss_scale` a list"),
    (1, {"weight": float("nan")}, "not served: turn 2 has the `weight` nan"),
    (1, {"train_detail": [{"begin_offset": 0}]}, "not served: turn 2 has `train_detail`"),
    (0, {"loss": True}, "not served: turn 1 is from user and has `loss` true, but only answers"),
    (0, {"training": True}, "not served: turn 1 is from user"),
])  # fmt: skip
def test_a_loss_that_is_not_served_is_refused(turn, keys, what):
    entry = {"conversations": chat("A?", "one")}
    entry["conversations"][turn].update(keys)
    assert reason("sharegpt", entry).startswith(what)


def test_a_question_s_weight_says_nothing():
    entry = {"conversations": chat("A?", "one")}
    entry["conversations"][0]["weight"] = 1
    assert read("sharegpt", entry).turns == read("sharegpt", {"conversations": chat("A?", "one")}
                                                 ).turns


def test_an_entry_without_an_answer_to_train_is_refused():
    entry = {"conversations": [{"from": "human", "value": "?"},
                               {"from": "gpt", "value": "x", "loss": False}]}
    assert reason("sharegpt", entry).startswith("no answer: none of its answers is to be trained")


@pytest.mark.parametrize(("options", "said"), [
    ({}, ["two<|im_end|>"]),
    ({"train_on_prompt": True}, None),
    ({"mask_history": True}, BadEntry),
])  # fmt: skip
def test_the_loss_leaves_them_out(hf_dir, spec, options, said):
    chat_of = ChatTokenizer.from_hf_dir(hf_dir, tokens=spec.tokens, family=family(spec.model_type),
                                        trained=TrainedText(**options))
    entry = _entry("sharegpt", ({"loss": False}, {}, {"weight": 0}))
    plain = _entry("sharegpt", ({}, {}, {}))
    turns, all_of_them = read("sharegpt", entry).turns, read("sharegpt", plain).turns
    if said is BadEntry:
        with pytest.raises(BadEntry, match="last answer, which mask-history alone trains"):
            chat_of.encode(turns, [])
        return
    tokens, labels = chat_of.encode(turns, [])
    decode = chat_of.tokenizer.decode
    want, trained = chat_of.encode(all_of_them, [])
    assert tokens.tolist() == want.tolist()
    if said is not None:
        assert decode(labels[labels != IGNORE]) == "".join(said)
    else:
        masked = (labels == IGNORE) & (trained != IGNORE)
        assert decode(trained[masked]) == "one<|im_end|>three<|im_end|>"
    assert (labels[labels != IGNORE] == trained[labels != IGNORE]).all()


