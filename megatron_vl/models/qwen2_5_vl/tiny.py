"""A tiny Qwen2.5-VL."""

from __future__ import annotations

from megatron_vl.models.common.tiny_vision import MERGE, patch_model_files
from megatron_vl.models.tiny import TinySizes


def files(sizes: TinySizes) -> dict[str, object]:
    """The files of its directory, without weights: windows of 2 x 2 tokens, but in the last layer.

    Like the published 3420, the width of the tower's MLP is divided by 4 alone.
    """
    return patch_model_files(
        sizes, model_type="qwen2_5_vl", architecture="Qwen2_5_VLForConditionalGeneration",
        vision={
            "fullatt_block_indexes": [sizes.vision_depth - 1],
            "hidden_act": "silu",
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": sizes.vision_hidden_size * sizes.vision_mlp_ratio - 4,
            "model_type": "qwen2_5_vl",
            "out_hidden_size": sizes.hidden_size,
            "tokens_per_second": 2,
            "window_size": 2 * MERGE * sizes.patch_size,
        },
    )
