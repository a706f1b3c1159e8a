"""The files beside config.json that text and pixels are made with."""

from __future__ import annotations

from pathlib import Path

from megatron_vl.errors import InputError

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
IMAGE_SETTINGS, VIDEO_SETTINGS = "preprocessor_config.json", "video_preprocessor_config.json"
JOINT_SETTINGS = "processor_config.json"  # where transformers 5 saves both


def missing_files(hf_dir: Path) -> list[str]:
    """Names of those that a Hugging Face directory lacks for training and for inference."""
    names = [name for name in TOKENIZER if not (hf_dir / name).is_file()]
    if not any((hf_dir / name).is_file() for name in (IMAGE_SETTINGS, JOINT_SETTINGS)):
        names.append(IMAGE_SETTINGS)
    return names


def check_model_files(hf_dir: Path) -> None:
    """Raises InputError: one is missing. What they hold is looked at where they are read."""
    if missing := missing_files(hf_dir):
        raise InputError(
            f"{hf_dir} has no {' and no '.join(missing)}, which training reads; copy what is "
            f"missing from the model's Hugging Face repository, or give hf-config "
            f"another directory."
        )
