"""config.json of Qwen3-VL, with experts or without."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_vl.models.common.decoder_config import Width, first
from megatron_vl.models.common.deepstack.vision_spec import DeepstackVisionSpec
from megatron_vl.models.common.media_config import PatchKeys, read_vision_language
from megatron_vl.models.spec import JsonGrounding, ModelSpec
from megatron_vl.typed import Name

# Keys and scale are those of QwenLM's cookbooks/2d_grounding.ipynb.
GROUNDING = JsonGrounding(point="point_2d", box="bbox_2d", label="label", scale=1000)
TIMESTAMP = "<{:.1f} seconds>"  # arXiv 2511.21631, section 2.3


class _Vision(PatchKeys):
    """vision_config."""

    hidden_size: Width
    intermediate_size: Width
    out_hidden_size: Width
    num_position_embeddings: Annotated[int, Field(ge=1, le=2**24)]
    deepstack_visual_indexes: list[Annotated[int, Field(ge=0, le=10_000)]]
    hidden_act: Name = "gelu_pytorch_tanh"


def read_deepstack(config: dict, *, with_experts: bool) -> ModelSpec:
    """The spec of a parsed config.json.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    return read_vision_language(
        config, _vision, GROUNDING, qk_norm=True, interleaved=True, timestamp=TIMESTAMP,
        with_experts=with_experts, outer_tie=True,
    )


def _vision(config: dict, decoder_hidden: int) -> DeepstackVisionSpec:
    keys = first(_Vision, config, at="vision_config")
    return DeepstackVisionSpec(
        **keys.shared(),
        hidden_size=keys.hidden_size,
        ffn_hidden_size=keys.intermediate_size,
        out_hidden_size=keys.out_hidden_size,
        activation=keys.hidden_act,
        num_positions=keys.num_position_embeddings,
        feature_layers=tuple(keys.deepstack_visual_indexes),
    )
