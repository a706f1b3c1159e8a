"""Every weight of Qwen-VL: those of its tower, of its resampler and of its decoder.

W vision width, E language width, Q queries.
"""

from __future__ import annotations

from dataclasses import fields, replace

from megatron_vl.models.common.decoder_rules import decoder_weights, whole_map
from megatron_vl.models.qwen_vl.vision_spec import ResampledVisionSpec
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parallel import VISION
from megatron_vl.weights.map import Place, Weight, WeightMap, Where
from megatron_vl.weights.rules import ColumnParallel, Copy, FusedQKV, RowParallel, Rule

VISUAL = "transformer.visual"
PUBLISHED = {  # what Qwen calls the modules of a decoder, by Qwen2's words for them
    ".embed_tokens.": ".wte.", ".layers.": ".h.", ".norm.": ".ln_f.",
    ".input_layernorm.": ".ln_1.", ".post_attention_layernorm.": ".ln_2.",
    ".self_attn.c_attn.": ".attn.c_attn.", ".self_attn.o_proj.": ".attn.c_proj.",
    ".mlp.gate_proj.": ".mlp.w2.", ".mlp.up_proj.": ".mlp.w1.", ".mlp.down_proj.": ".mlp.c_proj.",
}


def weight_map(spec: ModelSpec) -> WeightMap:
    """The map of a Qwen-VL with these sizes."""
    decoder = decoder_weights(spec.decoder, hf="transformer", head="lm_head.weight",
                              packed="c_attn")
    return whole_map(
        spec, "models/qwen_vl/weight_map.py",
        [*_tower(spec.vision), *_resampler(spec.vision), *map(_renamed, decoder)],
        embedding="transformer.wte.weight",
    )


def _renamed(weight: Weight) -> Weight:
    """A weight of the decoder under its published names."""
    keys = {}
    for field in fields(weight.rule):
        key = getattr(weight.rule, field.name)
        if isinstance(key, str):
            for word, published in PUBLISHED.items():
                key = key.replace(word, published)
            keys[field.name] = key
    return replace(weight, rule=replace(weight.rule, **keys))


def _tower(vision: ResampledVisionSpec) -> list[Weight]:
    W, F, patch = vision.hidden_size, vision.ffn_hidden_size, vision.patch_size
    block, layer = f"{VISUAL}.transformer.resblocks.{{i}}", "vision_model.decoder.layers.{i}"
    attention, mlp = f"{layer}.self_attention", f"{layer}.mlp"

    def at(where: Where, name: str, rule: Rule) -> Weight:
        return Weight(place=Place(where, VISION), name=name, rule=rule)

    def norm(where: Where, name: str, key: str) -> list[Weight]:
        """`name` ends where the leaf's begins."""
        return [at(where, f"{name}{leaf}", Copy(key=f"{VISUAL}.{key}.{leaf}", shape=(W,)))
                for leaf in ("weight", "bias")]

    def column(name: str, key: str, rows: int) -> list[Weight]:
        return [at(Where.LAYER, f"{name}.{leaf}",
                   ColumnParallel(key=f"{block}.{key}.{leaf}", shape=(rows, *tail)))
                for leaf, tail in (("weight", (W,)), ("bias", ()))]

    def row(name: str, key: str, columns: int) -> list[Weight]:
        return [
            at(Where.LAYER, f"{name}.weight",
               RowParallel(key=f"{block}.{key}.weight", shape=(W, columns))),
            at(Where.LAYER, f"{name}.bias", Copy(key=f"{block}.{key}.bias", shape=(W,))),
        ]

    resblock = block.removeprefix(f"{VISUAL}.")
    return [
        at(Where.START, "vision_model.patch_embed.weight",
           Copy(key=f"{VISUAL}.conv1.weight", shape=(W, vision.in_channels, patch, patch))),
        at(Where.START, "vision_model.positional_embedding",
           Copy(key=f"{VISUAL}.positional_embedding", shape=(vision.num_positions, W))),
        *norm(Where.START, "vision_model.pre_norm.", "ln_pre"),
        *norm(Where.LAYER, f"{attention}.linear_qkv.layer_norm_", f"{resblock}.ln_1"),
        *column(f"{attention}.linear_qkv", "attn.in_proj", 3 * W),  # published head by head
        *row(f"{attention}.linear_proj", "attn.out_proj", W),
        *norm(Where.LAYER, f"{mlp}.linear_fc1.layer_norm_", f"{resblock}.ln_2"),
        *column(f"{mlp}.linear_fc1", "mlp.c_fc", F),
        *row(f"{mlp}.linear_fc2", "mlp.c_proj", F),
    ]


def _resampler(vision: ResampledVisionSpec) -> list[Weight]:
    """With the norm and the matrix after it."""
    W, E, Q = vision.hidden_size, vision.out_hidden_size, vision.num_queries
    N, ours, pool = vision.resampler_heads, "vision_model.projection", f"{VISUAL}.attn_pool"

    def at_end(name: str, rule: Rule) -> Weight:
        return Weight(place=Place(Where.END, VISION), name=name, rule=rule)

    def copy(name: str, key: str, *shape: int) -> Weight:
        return at_end(name, Copy(key=key, shape=shape))

    def norm(name: str, key: str) -> list[Weight]:
        return [copy(f"{name}.{leaf}", f"{key}.{leaf}", E) for leaf in ("weight", "bias")]

    def qkv(leaf: str, columns: int | None) -> Weight:
        return at_end(f"{ours}.linear_qkv.{leaf}",
                      FusedQKV(key=f"{pool}.attn.in_proj_{leaf}", heads=N, head_dim=E // N,
                               columns=columns))

    return [
        copy(f"{ours}.query", f"{pool}.query", Q, E),
        Weight(place=Place(Where.END, VISION), name=f"{ours}.pos_embed", constant=True,
               rule=Copy(key=f"{pool}.pos_embed", shape=(Q, E))),
        # Of equal widths the published code projects nothing.
        *([copy(f"{ours}.kv_proj.weight", f"{pool}.kv_proj.weight", E, W)] if W != E else []),
        *norm(f"{ours}.ln_q", f"{pool}.ln_q"),
        *norm(f"{ours}.ln_kv", f"{pool}.ln_kv"),
        qkv("weight", E),
        qkv("bias", None),
        at_end(f"{ours}.linear_proj.weight",
               RowParallel(key=f"{pool}.attn.out_proj.weight", shape=(E, E))),
        copy(f"{ours}.linear_proj.bias", f"{pool}.attn.out_proj.bias", E),
        *norm("vision_model.post_norm", f"{VISUAL}.ln_post"),
        copy("vision_model.proj", f"{VISUAL}.proj", E, E),
    ]
