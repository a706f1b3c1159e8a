"""Fixtures that several test folders share: a tiny model's directory and a small real dataset."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _toolkit(script: str, *arguments: object) -> None:
    subprocess.run([sys.executable, ROOT / "toolkits" / script, *map(str, arguments)], check=True)


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory) -> Path:
    """A tiny random Qwen2-VL with a real tokenizer, chat template and image settings."""
    out = tmp_path_factory.mktemp("hf") / "tiny"
    _toolkit("make_tiny_hf_checkpoint.py", out, "--hidden-size", 32, "--num-layers", 2,
             "--ffn-size", 32, "--vision-depth", 1, "--vision-hidden-size", 32, "--ranks", 1500)
    return out


@pytest.fixture(scope="session")
def spec(hf_dir):
    """The tiny model's `VLMSpec`."""
    from megatron_vl.models import load_spec

    return load_spec(hf_dir)


@pytest.fixture(scope="session")
def llava_dir(tmp_path_factory) -> Path:
    """easy-VQA's first images and their questions as LLaVA-style JSON."""
    out = tmp_path_factory.mktemp("easy_vqa") / "llava"
    _toolkit("pretrain_data_preprocessing/easy_vqa_to_llava.py", out, "--max-images", 40)
    return out


@pytest.fixture(scope="session")
def wds_dir(llava_dir) -> Path:
    """The same, prepared by the command a user types."""
    _toolkit("pretrain_data_preprocessing/convert_llava_pretrain_to_wds.py", llava_dir,
             "--json", "train.json", "--quiet")
    return llava_dir / "wds"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """Four language and two vision layers, so that uneven splits and virtual stages exist."""
    out = tmp_path_factory.mktemp("hf4") / "model"
    _toolkit("make_tiny_hf_checkpoint.py", out, "--hidden-size", 64, "--ffn-size", 96, "--ranks",
             1500, "--dtype", "float32")
    return out
