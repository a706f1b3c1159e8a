"""Every weight of Qwen2-VL: its published names, its Megatron-Core name, the rule between them.

W vision width, M merged width (W x merge^2), A heads of the vision tower.
"""

from __future__ import annotations

from megatron_vl.models.common.decoder_rules import decoder_weights, whole_map
from megatron_vl.models.spec import VisionSpec, VLMSpec
from megatron_vl.weights.map import Place, Weight, WeightMap, Where
from megatron_vl.weights.rules import ColumnParallel, Copy, FusedQKV, RowParallel

# transformers 4.52 and newer name the modules in memory so; published files keep the older names.
RENAMED = (("model.language_model.", "model."), ("model.visual.", "visual."))


def weight_map(spec: VLMSpec) -> WeightMap:
    """The map of a Qwen2-VL with these sizes."""
    decoder = decoder_weights(spec.decoder, hf="model", head="lm_head.weight")
    return whole_map(
        spec, "models/qwen2_vl/weight_map.py", _vision_weights(spec.vision) + decoder,
        renamed=RENAMED,
    )


def _vision_weights(vision: VisionSpec) -> list[Weight]:
    W, F, M = vision.hidden_size, vision.ffn_hidden_size, vision.merged_size
    A, D, out = vision.num_heads, vision.head_dim, vision.out_hidden_size
    block, layer = "visual.blocks.{i}", "vision_model.decoder.layers.{i}"
    merger, projection = "visual.merger", "vision_model.projection.encoder"
    patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)

    def at_layer(name: str, rule) -> Weight:
        return Weight(place=Place(Where.LAYER, "vit"), name=f"{layer}.{name}", rule=rule)

    def at_end(name: str, rule) -> Weight:
        return Weight(place=Place(Where.END, "vit"), name=name, rule=rule)

    def norm(name: str, leaf: str) -> Weight:
        return at_layer(name, Copy(key=f"{block}.{leaf}", shape=(W,)))

    def qkv(leaf: str, columns: int | None) -> FusedQKV:
        return FusedQKV(key=f"{block}.attn.qkv.{leaf}", heads=A, head_dim=D, columns=columns)

    qkv_name, fc1 = "self_attention.linear_qkv", "mlp.linear_fc1"
    return [
        Weight(
            place=Place(Where.START, "vit"), name="vision_model.patch_embed.proj.weight",
            rule=Copy(key="visual.patch_embed.proj.weight",
                      shape=(W, vision.in_channels, *patch)),
        ),
        norm(f"{qkv_name}.layer_norm_weight", "norm1.weight"),
        norm(f"{qkv_name}.layer_norm_bias", "norm1.bias"),
        at_layer(f"{qkv_name}.weight", qkv("weight", W)),
        at_layer(f"{qkv_name}.bias", qkv("bias", None)),
        at_layer("self_attention.linear_proj.weight",
                 RowParallel(key=f"{block}.attn.proj.weight", shape=(W, W))),
        at_layer("self_attention.linear_proj.bias",
                 Copy(key=f"{block}.attn.proj.bias", shape=(W,))),
        norm(f"{fc1}.layer_norm_weight", "norm2.weight"),
        norm(f"{fc1}.layer_norm_bias", "norm2.bias"),
        at_layer(f"{fc1}.weight", ColumnParallel(key=f"{block}.mlp.fc1.weight", shape=(F, W))),
        at_layer(f"{fc1}.bias", ColumnParallel(key=f"{block}.mlp.fc1.bias", shape=(F,))),
        at_layer("mlp.linear_fc2.weight", RowParallel(key=f"{block}.mlp.fc2.weight", shape=(W, F))),
        at_layer("mlp.linear_fc2.bias", Copy(key=f"{block}.mlp.fc2.bias", shape=(W,))),
        at_end("vision_model.decoder.final_layernorm.weight",
               Copy(key=f"{merger}.ln_q.weight", shape=(W,))),
        at_end("vision_model.decoder.final_layernorm.bias",
               Copy(key=f"{merger}.ln_q.bias", shape=(W,))),
        at_end(f"{projection}.linear_fc1.weight",
               ColumnParallel(key=f"{merger}.mlp.0.weight", shape=(M, M))),
        at_end(f"{projection}.linear_fc1.bias",
               ColumnParallel(key=f"{merger}.mlp.0.bias", shape=(M,))),
        at_end(f"{projection}.linear_fc2.weight",
               RowParallel(key=f"{merger}.mlp.2.weight", shape=(out, M))),
        at_end(f"{projection}.linear_fc2.bias", Copy(key=f"{merger}.mlp.2.bias", shape=(out,))),
    ]
