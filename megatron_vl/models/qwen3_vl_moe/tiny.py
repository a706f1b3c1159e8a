"""A tiny Qwen3-VL with experts."""

from __future__ import annotations

from megatron_vl.models.common.deepstack.tiny import DEFAULTS, deepstack_model_files
from megatron_vl.models.common.tiny_qwen3 import qwen3_experts
from megatron_vl.models.tiny import TinySizes

__all__ = ["DEFAULTS", "files"]


def files(sizes: TinySizes) -> dict[str, object]:
    """The files of its directory, without weights."""
    return deepstack_model_files(
        sizes, model_type="qwen3_vl_moe", architecture="Qwen3VLMoeForConditionalGeneration",
        text=qwen3_experts(sizes),
    )
