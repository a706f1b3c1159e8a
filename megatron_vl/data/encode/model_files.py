"""The files beside config.json that text and pixels are made with."""

from __future__ import annotations

from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.models.family import COPY_AGAIN, TOKENIZER, Family
from megatron_vl.models.spec import ModelSpec
from megatron_vl.typed import Name, Shape, Text, read_file


def missing_files(hf_dir: Path, spec: ModelSpec, family: Family) -> list[str]:
    """Names of those that a Hugging Face directory lacks for training and for inference."""
    names = [name for name in family.tokenizer_files() if not (hf_dir / name).is_file()]
    return names + family.missing_media_files(hf_dir, spec)


class Named(Shape):
    name: Name
    template: Text


class TokenizerFile(Shape):
    chat_template: Text | list[Named] | None = None


def check_tokenizer(hf_dir: Path) -> None:
    """Raises InputError: tokenizer_config.json cannot be used."""
    read_file(hf_dir / "tokenizer_config.json", TokenizerFile, mend=COPY_AGAIN)


def check_model_files(hf_dir: Path, spec: ModelSpec, family: Family) -> None:
    """Raises InputError: one is missing, or it can be told already that it cannot be used."""
    if missing := missing_files(hf_dir, spec, family):
        raise InputError(
            f"{hf_dir} has no {' and no '.join(missing)}, which training reads; copy what is "
            f"missing from the model's Hugging Face repository, or give hf-config "
            f"another directory."
        )
    family.check_media_files(hf_dir, spec)
    if family.tokenizer_files() == TOKENIZER:
        check_tokenizer(hf_dir)
    else:
        family.prompt(hf_dir, spec)
