"""Which files Qwen-VL's patches are made with: none, its own code has every setting."""

from __future__ import annotations

from pathlib import Path

from megatron_vl.models.spec import ModelSpec


def missing_media_files(hf_dir: Path) -> list[str]:
    """See `megatron_vl.models.family.Family`."""
    return []


def check_media_files(hf_dir: Path, spec: ModelSpec) -> None:
    """See `megatron_vl.models.family.Family`."""
