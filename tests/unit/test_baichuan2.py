"""Baichuan2's tokens and labels are those of its own fine-tuning; its files are its own."""

from __future__ import annotations

import io
import json
import random
import shutil

import pytest
import sentencepiece

from megatron_vl.cli.main import run
from megatron_vl.data.conversation import BadEntry, Part, Turn
from megatron_vl.data.encode.model import ModelEncoder
from megatron_vl.data.encode.model_files import check_model_files, missing_files
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.options import TrainedText
from megatron_vl.errors import InputError
from megatron_vl.models import family, load_spec
from megatron_vl.models.baichuan2.tiny import TEXT, trained_pieces

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
LENGTH = 48


@pytest.fixture(scope="module")
def model(baichuan_model_dir):
    spec = load_spec(baichuan_model_dir)
    return {"hf_dir": baichuan_model_dir, "spec": spec, "family": family(spec.model_type)}


@pytest.fixture(scope="module")
def pieces(baichuan_model_dir):
    path = baichuan_model_dir / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def official(pieces, said: list[tuple[str, str]], length: int) -> tuple[list[int], list[int]]:
    """Tokens and shifted labels as the published fine-tune.py makes them.

    The label of a user's mark is </s>; transformers shifts labels by one.
    """
    tokens, labels = [], []
    for who, value in said:
        ids = pieces.encode(value)
        tokens += [195 if who == "human" else 196, *ids]
        labels += [2, *[IGNORE] * len(ids)] if who == "human" else [IGNORE, *ids]
    tokens, labels = [*tokens, 2][:length], [*labels, 2][:length]
    return tokens, [*labels[1:], IGNORE]


SAID = {
    "one round": [("human", "How many apples are there?"), ("gpt", "There are 12.")],
    "values as they are": [("human", " What is 1+1?\n\n"), ("gpt", "\n it is 2 \n")],
    "rounds": [("human", "请问你叫什么名字？\n"), ("gpt", "我叫小明。\n"), ("human", "\t再说 ones"),
               ("gpt", "好。🙂")],
    "two questions": [("human", "One."), ("human", "Two?"), ("gpt", "three")],
    "two answers": [("human", "One."), ("gpt", "two"), ("gpt", "three")],
}


def encoded(model, said, **options) -> tuple[list[int], list[int]]:
    encoder = ModelEncoder.from_hf_dir(**model, trained=TrainedText(**options))
    turns = [Turn(role=ROLES[who], parts=(Part(text=text),)) for who, text in said]
    tokens, labels, _ = encoder.encode(turns, ())
    return tokens.tolist(), labels.tolist()


@pytest.mark.parametrize("name", SAID)
def test_tokens_and_labels_are_the_published_recipes(name, model, pieces):
    assert encoded(model, SAID[name]) == official(pieces, SAID[name], 10**6)


def trained_text(pieces, tokens, labels) -> list[str]:
    return [pieces.id_to_piece(label) for label in labels if label != IGNORE]


def test_what_is_trained_can_be_told(model, pieces):
    rounds = [("system", "Hi"), ("human", "1"), ("gpt", "2"), ("human", "3"), ("gpt", "4")]
    tokens, labels = encoded(model, rounds)
    assert tokens[:3] == [*pieces.encode("Hi"), 195], "a system prompt comes first, without a mark"
    assert trained_text(pieces, tokens, labels) == ["2", "</s>", "4", "</s>"]
    labels = encoded(model, rounds, mask_history=True)[1]
    assert trained_text(pieces, tokens, labels) == ["4", "</s>"]
    labels = encoded(model, rounds, train_on_prompt=True)[1]
    assert trained_text(pieces, tokens, labels) == [
        *pieces.encode("Hi", out_type=str)[1:], "1", "<reserved_107>", "2", "</s>", "3",
        "<reserved_107>", "4", "</s>"]


def test_a_mark_in_a_text_and_tools_are_refused(model):
    with pytest.raises(BadEntry, match="turn 1 holds the reserved mark <reserved_107>"):
        encoded(model, [("human", "a <reserved_107> b"), ("gpt", "c")])
    encoder = ModelEncoder.from_hf_dir(**model)
    turns = [Turn(role="user", parts=(Part(text="a"),)),
             Turn(role="assistant", parts=(Part(text="b"),))]
    with pytest.raises(BadEntry, match="it has tools, which this model has no form for"):
        encoder.encode(turns, (), '[{"name": "f"}]')


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """BELLE's form: values of any blanks, some longer than a row; and what was said, by id."""
    root, draw = tmp_path_factory.mktemp("belle"), random.Random(0)
    lines = TEXT.strip().splitlines()
    said = {}
    for number in range(30):
        turns = [(who, draw.choice(lines)[: draw.randrange(2, 60)] + "\n" * draw.randrange(3))
                 for who in ("human", "gpt") * draw.randrange(1, 4)]
        said[str(number)] = turns
    said["30"] = [("human", lines[0] * 5), ("gpt", "too late")]
    entries = [{"id": name, "conversations": [{"from": who, "value": text} for who, text in turns]}
               for name, turns in said.items()]
    (root / "belle.json").write_text(json.dumps(entries, ensure_ascii=False))
    assert run(["prepare", str(root / "belle.json"), str(root / "wds"), "--format", "sharegpt",
                "--split", "1,0,0", "--quiet"]) == 0
    return root / "wds", said


def test_rows_are_the_recipes_down_to_where_they_are_cut(model, pieces, prepared):
    wds, said = prepared
    config = DataConfig(
        train=Mixture.parse(str(wds)), seq_length=LENGTH, truncate_samples=True, num_workers=0,
        packing_buffer_size=None, shuffle_buffer_size=0, max_skipped_samples=10**6,
    )
    want = {}
    for turns in list(said.values())[:-1]:
        whole, _ = official(pieces, turns, 10**6)
        want[tuple(map(tuple, official(pieces, turns, LENGTH)))] = len(whole)
    found, skipped = {}, []
    for batch, _ in zip(build_train_loader(config, **model), range(3 * len(said)), strict=False):
        (length,), (cut,) = batch.sample_lengths, batch.tokens_cut
        row = tuple(tuple(one[0, :length].tolist()) for one in (batch.tokens, batch.labels))
        found[row] = length + cut
        skipped += batch.skipped
        assert (batch.tokens[0, length:] == 0).all() and not batch.loss_mask[0, length:].any()
    assert found == want and any(full > LENGTH for full in want.values())
    assert {one.reason for one in skipped} == {"too long"}
    assert "nothing is trained of the first 48" in skipped[0].message


FILES = [
    (lambda path: path.unlink(), "has no tokenizer.model, which training reads"),
    (lambda path: path.write_text("{}"), "is no SentencePiece model"),
    (lambda path: path.write_bytes(other_pieces()), "has fox at 1 where Baichuan2's has <s>"),
]


def other_pieces() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, model_type="bpe",
        vocab_size=500, byte_fallback=True, bos_id=-1, user_defined_symbols=["fox"],
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize(("spoil", "says"), FILES, ids=[says for _, says in FILES])
def test_a_wrong_tokenizer_is_told(spoil, says, model, tmp_path):
    copy = shutil.copytree(model["hf_dir"], tmp_path / "copy")
    spoil(copy / "tokenizer.model")
    with pytest.raises(InputError, match=says):
        check_model_files(copy, model["spec"], model["family"])


def test_its_own_files_are_what_it_needs(model):
    assert missing_files(model["hf_dir"], model["spec"], model["family"]) == []
    check_model_files(model["hf_dir"], model["spec"], model["family"])


def test_the_tiny_tokenizer_is_the_same_every_time(model):
    assert (model["hf_dir"] / "tokenizer.model").read_bytes() == trained_pieces()
