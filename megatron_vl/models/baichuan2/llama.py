"""Baichuan2-7B as a Llama, which transformers and vLLM load without code of the model's.

q, k and v are cut out of W_pack, and the head is normalised once and for all: the numbers a model
computes are the same. Training goes on from the raw head, so this form is for inference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from megatron_vl.errors import InputError
from megatron_vl.models.baichuan2.config import ROPE
from megatron_vl.models.baichuan2.tokenizer import ASSISTANT, MARKS, USER, load_pieces
from megatron_vl.models.spec import ModelSpec
from megatron_vl.typed import read_file
from megatron_vl.weights.hf_io import open_safetensors
from megatron_vl.weights.map import Stored, WeightMap
from megatron_vl.weights.row_norms import normalize_rows
from megatron_vl.weights.targets import HFTarget

PACKED, HEAD = "W_pack", "lm_head.weight"
KEPT = (  # of config.json
    "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "rms_norm_eps", "tie_word_embeddings", "torch_dtype", "use_cache",
    "vocab_size",
)
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<reserved_106>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<reserved_107>' }}{% endif %}"
    "{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaTarget(HFTarget):
    """Llama's names in safetensors, beside Llama's config.json and tokenizer."""

    side_files: ClassVar[tuple[str, ...]] = (
        "config.json", "generation_config.json", "tokenizer.model", "LICENSE*",
    )

    def wanted(self, weights: WeightMap) -> list[Stored]:
        return [part for stored in weights.hf_inventory() for part in _parts(stored)]

    def finish(self, root: Path, dtype: str) -> None:
        for file in root.glob("*.safetensors"):
            if head := open_safetensors(file).get(HEAD):
                normalize_rows(head)
        config = read_file(root / "config.json", dict, mend="copy it again")
        kept = {key: config[key] for key in KEPT if key in config}
        _write(root / "config.json", kept | ROPE | {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype,
            "num_key_value_heads": config["num_attention_heads"],
        })
        _write(root / "tokenizer_config.json", _tokenizer_config(config))


def _parts(stored: Stored) -> list[Stored]:
    """q, k and v of a W_pack; another tensor as it is."""
    if PACKED not in stored.name:
        return [stored]
    (piece,), height = stored.pieces, stored.shape[0] // 3
    shape = (height, *stored.shape[1:])
    return [
        replace(stored, name=stored.name.replace(PACKED, f"{one}_proj"), shape=shape,
                pieces=(replace(piece, start=(number * height, 0), shape=shape),))
        for number, one in enumerate("qkv")
    ]


def _tokenizer_config(config: dict) -> dict:
    """Of transformers' Llama tokenizer, which makes the same tokens of a text when told to put no
    blank before it."""
    marks = {number: {"content": MARKS[number], "lstrip": False, "normalized": False,
                      "rstrip": False, "single_word": False, "special": True}
             for number in (0, 1, 2, USER, ASSISTANT)}
    return {
        "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": {str(number): mark for number, mark in marks.items()},
        "bos_token": MARKS[1], "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False,
        "eos_token": MARKS[2], "model_max_length": config["max_position_embeddings"],
        "pad_token": MARKS[0], "tokenizer_class": "LlamaTokenizer", "unk_token": MARKS[0],
    }


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def llama_target(config_dir: Path, spec: ModelSpec, *, max_shard_bytes: int) -> LlamaTarget:
    """What writes this form.

    Raises:
        InputError: the tokenizer is not there, or Llama's would make other tokens.
    """
    pieces: Sequence[str] = load_pieces(config_dir, spec.decoder.vocab_size).encode_as_pieces("a")
    if pieces[0].startswith("\u2581"):
        raise InputError(
            f"{config_dir / 'tokenizer.model'} puts a blank before every text "
            f"(add_dummy_prefix), which transformers' Llama tokenizer does not do alike; leave out "
            f"--llamafy."
        )
    return LlamaTarget(max_shard_bytes=max_shard_bytes)
