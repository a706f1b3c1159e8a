"""Baichuan2's SentencePiece model, by the package sentencepiece itself.

transformers knows the published tokenizer as code of the model's repository alone, and that code
fails with its newer versions.
"""

from __future__ import annotations

from pathlib import Path

from megatron_vl.errors import InputError, shown
from megatron_vl.models.family import COPY_AGAIN

FILES = ("tokenizer.model",)
BOS, EOS = 1, 2
USER, ASSISTANT = 195, 196  # <reserved_106> and <reserved_107>, which begin a turn
MARKS = {0: "<unk>", BOS: "<s>", EOS: "</s>", USER: "<reserved_106>", ASSISTANT: "<reserved_107>"}


def load_pieces(hf_dir: Path, vocab_size: int):
    """The `sentencepiece.SentencePieceProcessor` of a directory.

    Raises:
        InputError: no such file, one that is no SentencePiece model, or another model's.
    """
    import sentencepiece

    path = hf_dir / FILES[0]
    if not path.is_file():
        raise InputError(f"{path} is missing; copy it from the model's Hugging Face repository.")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise InputError(f"{path} is no SentencePiece model; {COPY_AGAIN}.") from error
    if len(pieces) > vocab_size:
        raise InputError(
            f"{path} has {len(pieces):,} pieces but config.json's vocab_size is {vocab_size:,}; "
            f"take both files from the same model."
        )
    for number, mark in MARKS.items():
        there = pieces.id_to_piece(number) if number < len(pieces) else "nothing"
        if there != mark:
            raise InputError(
                f"{path} has {shown(there)} at {number} where Baichuan2's has {mark}; {COPY_AGAIN}."
            )
    return pieces
