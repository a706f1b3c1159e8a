"""config.json of Qwen-VL and Qwen-VL-Chat, with the keys that their own code reads.

Their `model_type` is that of Qwen, the language model of 2023; a `visual` table tells them apart.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_vl.errors import InputError
from megatron_vl.models.common.decoder_config import Layers, TokenId, Width, first, read_dtype
from megatron_vl.models.decoder_spec import DecoderSpec
from megatron_vl.models.qwen_vl.vision_spec import ResampledVisionSpec
from megatron_vl.models.spec import Grounding, ModelSpec, TokenIds
from megatron_vl.typed import Positive, Shape, Size

SIZES = {"7B": (32, 4096)}  # published: (language layers, hidden size)
POSITIONS = 256  # of the tower's stored table; fixed in the published code, as these are:
RESAMPLER_HEAD = 128  # width
CHANNELS = 3
GROUNDING = Grounding(  # arXiv 2308.12966, section 3.1: coordinates within [0, 1000)
    ref=("<ref>", "</ref>"), box=("<box>", "</box>"), quad=("<quad>", "</quad>"), scale=1000,
)


class _Decoder(Shape):
    """The language model's keys."""

    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    kv_channels: Width
    intermediate_size: Annotated[int, Field(ge=2, le=2**20, multiple_of=2)]  # w1 and w2 together
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    layer_norm_epsilon: Positive
    max_position_embeddings: Size
    rotary_emb_base: Positive = 10000.0
    rotary_pct: Literal[1.0] = 1.0
    no_bias: Literal[True] = True
    initializer_range: Positive = 0.02
    tie_word_embeddings: bool = False


class _Visual(Shape):
    """visual"""

    width: Width
    layers: Layers
    heads: Width
    mlp_ratio: Annotated[Positive, Field(le=1024)]
    image_size: Annotated[int, Field(ge=1, le=65536)]
    patch_size: Annotated[int, Field(ge=1, le=1024)]
    output_dim: Width
    n_queries: Annotated[int, Field(ge=1, le=65536)] = 256
    image_start_id: TokenId


def read_config(config: dict) -> ModelSpec:
    """The spec of a parsed config.json of Qwen-VL.

    Raises:
        InputError: a key that is missing or unusable, named; or a model that is not Qwen-VL.
    """
    if not isinstance(config.get("visual"), dict):
        raise InputError(
            "model_type is qwen but there is no visual section: this is Qwen, the language model "
            "of 2023, which is not supported; Qwen-VL and Qwen-VL-Chat are."
        )
    keys, visual = first(_Decoder, config), first(_Visual, config["visual"], at="visual")
    if visual.output_dim % RESAMPLER_HEAD:
        raise InputError(
            f"visual.output_dim is {visual.output_dim}; the resampler's heads are {RESAMPLER_HEAD} "
            f"wide, so it must be a multiple of that."
        )
    heads, head_dim = keys.num_attention_heads, keys.kv_channels
    if heads * head_dim != keys.hidden_size:
        raise InputError(
            f"{heads} num_attention_heads of kv_channels {head_dim} are {heads * head_dim} wide "
            f"but hidden_size is {keys.hidden_size}; only equal widths are supported."
        )
    if head_dim % 2:
        raise InputError(f"kv_channels is {head_dim}; rotary embedding needs an even width.")
    start = visual.image_start_id  # its end and what fills its places follow
    return ModelSpec(
        model_type=config["model_type"],
        dtype=read_dtype(config),
        decoder=DecoderSpec(
            num_layers=keys.num_hidden_layers,
            hidden_size=keys.hidden_size,
            ffn_hidden_size=keys.intermediate_size // 2,
            num_attention_heads=heads,
            num_query_groups=heads,
            head_dim=head_dim,
            vocab_size=keys.vocab_size,
            tie_word_embeddings=keys.tie_word_embeddings,
            norm_eps=keys.layer_norm_epsilon,
            rope_theta=keys.rotary_emb_base,
            rope_sections=(head_dim // 2,),
            qkv_bias=True,
            max_position_embeddings=keys.max_position_embeddings,
            init_std=keys.initializer_range,
        ),
        vision=ResampledVisionSpec(
            depth=visual.layers,
            hidden_size=visual.width,
            num_heads=visual.heads,
            ffn_hidden_size=int(visual.width * visual.mlp_ratio),
            in_channels=CHANNELS,
            image_size=visual.image_size,
            patch_size=visual.patch_size,
            num_positions=POSITIONS,
            num_queries=visual.n_queries,
            resampler_heads=visual.output_dim // RESAMPLER_HEAD,
            out_hidden_size=visual.output_dim,
            norm_eps=1e-6,  # fixed in the published code
        ),
        tokens=TokenIds(
            image=start + 2, vision_start=start, vision_end=start + 1, spanned=True,
            grounding=GROUNDING,
        ),
    )
