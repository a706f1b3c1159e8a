"""Baichuan2 as a Llama: what transformers makes of it without code of the model's is the same."""

from __future__ import annotations

import json
import shutil

import pytest
import sentencepiece
import torch
from commands import megatron_vl
from tiny_hf import read
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from megatron_vl.models import family
from megatron_vl.models.baichuan2.tiny import TEXT, trained_pieces


@pytest.fixture(scope="module")
def llama_dir(baichuan_model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    done = megatron_vl("convert", baichuan_model_dir, root / "mcore", "--tp", 2, "--pp", 2)
    assert done.code == 0, done.text
    done = megatron_vl("convert", root / "mcore", root / "hf", "--to", "hf", "--llamafy")
    assert done.code == 0 and "warning" not in done.text, done.text
    return root / "hf"


def test_it_computes_what_the_judge_does(baichuan_model_dir, llama_dir):
    llama = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    assert type(llama) is LlamaForCausalLM
    judge = family("baichuan").judge().from_pretrained(baichuan_model_dir)
    tokens = torch.arange(1, 60)[None]
    torch.testing.assert_close(llama(tokens).logits, judge(input_ids=tokens).logits)


def test_its_tokenizer_makes_the_same_tokens_and_its_template_the_same_dialogue(
    baichuan_model_dir, llama_dir
):
    theirs = AutoTokenizer.from_pretrained(llama_dir)
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(baichuan_model_dir / "tokenizer.model"))
    for text in (*TEXT.splitlines(), "  two  blanks\n\n x ", "\n a", "🙂 12345\tb", " ", ""):
        assert theirs.encode(text) == pieces.encode(text), repr(text)
    said = [("system", "Hi"), ("user", "What is 1?\n"), ("assistant", " one"), ("user", "so ")]
    messages = [{"role": role, "content": text} for role, text in said]
    made = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    marks = {"system": [], "user": [195], "assistant": [196]}
    assert made == [*(token for role, text in said for token in
                      (*marks[role], *pieces.encode(text))), 196]


def test_a_normalised_head_is_told_and_the_raw_one_is_kept(
    baichuan_model_dir, llama_dir, tmp_path
):
    raw, unit = read(baichuan_model_dir), read(llama_dir)["lm_head.weight"]
    torch.testing.assert_close(unit, F.normalize(raw["lm_head.weight"]))
    from safetensors.torch import save_file

    copy = shutil.copytree(baichuan_model_dir, tmp_path / "unit")
    save_file(raw | {"lm_head.weight": unit}, copy / "model.safetensors")
    done = megatron_vl("convert", copy, tmp_path / "out", "--tp", 2)
    assert "the rows of lm_head.weight have length 1" in done.out, done.text
    done = megatron_vl("convert", baichuan_model_dir, tmp_path / "raw", "--tp", 2)
    assert done.code == 0 and "length 1" not in done.out, done.text


def test_what_cannot_be_a_llama_is_refused(baichuan_model_dir, text_model_dir, tmp_path):
    copy = shutil.copytree(baichuan_model_dir, tmp_path / "blank")
    (copy / "tokenizer.model").write_bytes(trained_pieces(add_dummy_prefix=True))
    for source, words, says in (
        (text_model_dir, ["--to", "hf"], "--llamafy is not for qwen2, which is no Llama"),
        (baichuan_model_dir, [], "give --to hf"),
        (copy, ["--to", "hf"], "puts a blank before every text"),
    ):
        done = megatron_vl("convert", source, tmp_path / "out", "--llamafy", *words)
        assert done.code == 2 and says in done.err and "Traceback" not in done.err, done.text
    assert not (tmp_path / "out").exists()


def test_its_config_is_llamas(llama_dir):
    config = json.loads((llama_dir / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"]) == ("llama", 4)
    assert "auto_map" not in config
