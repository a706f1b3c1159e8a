"""Qwen's tokenizer of 2023: `qwen.tiktoken`, read by the package tiktoken itself.

transformers knows it as code of the model's repository alone. The ranks are Qwen2's, but the marks
behind them have other ids.
"""

from __future__ import annotations

import base64
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.models.common.tiny_tokenizer import PRE_TOKENIZER
from megatron_vl.models.family import COPY_AGAIN
from megatron_vl.models.spec import ModelSpec

FILES = ("qwen.tiktoken",)
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
OF_OBJECTS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
MARKS = (  # in the order of their ids, which follow the ranks
    END_OF_TEXT, TURN_START, TURN_END, *(f"<|extra_{number}|>" for number in range(205)),
    *OF_OBJECTS, IMAGE_START, IMAGE_END, IMAGE_PAD,
)


def load_encoding(hf_dir: Path, spec: ModelSpec):
    """The `tiktoken.Encoding` of a directory.

    Raises:
        InputError: no such file, one that is no list of ranks, or another model's.
    """
    import tiktoken

    path = hf_dir / FILES[0]
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing; copy it from the model's Hugging Face repository."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is no list of tokens and ranks; {COPY_AGAIN}.") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path} lacks ranks, or has one twice; {COPY_AGAIN}.")
    marks = {mark: number for number, mark in enumerate(MARKS, start=len(ranks))}
    if marks[IMAGE_START] != spec.tokens.vision_start:
        raise InputError(
            f"{path} has {len(ranks):,} ranks, so that {IMAGE_START} is token "
            f"{marks[IMAGE_START]}, but config.json's image_start_id is "
            f"{spec.tokens.vision_start}; take both files from the same model."
        )
    if marks[IMAGE_PAD] >= spec.decoder.vocab_size:
        raise InputError(
            f"{path} has tokens up to {marks[IMAGE_PAD]} but config.json's vocab_size is "
            f"{spec.decoder.vocab_size}; take both files from the same model."
        )
    return tiktoken.Encoding(
        path.stem, pat_str=PRE_TOKENIZER, mergeable_ranks=ranks, special_tokens=marks
    )
