"""A tiny Qwen2-VL."""

from __future__ import annotations

from megatron_vl.models.common.tiny_vision import patch_model_files
from megatron_vl.models.tiny import TinySizes


def files(sizes: TinySizes) -> dict[str, object]:
    """The files of its directory, without weights."""
    return patch_model_files(
        sizes, model_type="qwen2_vl", architecture="Qwen2VLForConditionalGeneration",
        vision={
            "embed_dim": sizes.vision_hidden_size,
            "hidden_size": sizes.hidden_size,
            "mlp_ratio": sizes.vision_mlp_ratio,
        },
    )
