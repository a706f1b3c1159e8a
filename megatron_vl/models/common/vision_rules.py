"""The weights that the vision towers of Qwen2-VL and of those after it have under both names.

W vision width, M merged width (W x merge^2), A heads of the vision tower.
"""

from __future__ import annotations

from megatron_vl.models.tower_spec import VisionSpec
from megatron_vl.parallel import VISION
from megatron_vl.weights.map import Place, Weight, Where
from megatron_vl.weights.rules import ColumnParallel, Copy, FusedQKV, GateUp, RowParallel

# transformers 4.52 and newer name the modules in memory so; published files keep the older names.
RENAMED = (("model.language_model.", "model."), ("model.visual.", "visual."))


def vision_weights(vision: VisionSpec) -> list[Weight]:
    """Every weight of the tower and of the merger."""
    W, F, M = vision.hidden_size, vision.ffn_hidden_size, vision.merged_size
    A, D, out = vision.num_heads, vision.head_dim, vision.out_hidden_size
    block, layer = "visual.blocks.{i}", "vision_model.decoder.layers.{i}"
    merger, projection = "visual.merger", "vision_model.projection.encoder"
    patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)

    def at_layer(name: str, rule) -> Weight:
        return Weight(place=Place(Where.LAYER, VISION), name=f"{layer}.{name}", rule=rule)

    def at_end(name: str, rule) -> Weight:
        return Weight(place=Place(Where.END, VISION), name=name, rule=rule)

    def norm(name: str, key: str, at) -> list[Weight]:
        """The weight and, of a LayerNorm, the bias; `name` ends where the leaf's begins."""
        leaves = ("weight", "bias") if vision.normalization == "LayerNorm" else ("weight",)
        return [at(f"{name}{leaf}", Copy(key=f"{key}.{leaf}", shape=(W,))) for leaf in leaves]

    def qkv(leaf: str, columns: int | None) -> FusedQKV:
        return FusedQKV(key=f"{block}.attn.qkv.{leaf}", heads=A, head_dim=D, columns=columns)

    def first(leaf: str, columns: int | None) -> ColumnParallel | GateUp:
        """Of the MLP."""
        mlp = f"{block}.mlp"
        if vision.gated:
            return GateUp(gate=f"{mlp}.gate_proj.{leaf}", up=f"{mlp}.up_proj.{leaf}", ffn=F,
                          columns=columns, padded=vision.stored_ffn_size)
        shape = (F,) if columns is None else (F, columns)
        return ColumnParallel(key=f"{mlp}.fc1.{leaf}", shape=shape)

    second = f"{block}.mlp.{'down_proj' if vision.gated else 'fc2'}"
    padded = vision.stored_ffn_size if vision.gated else None
    qkv_name, fc1 = "self_attention.linear_qkv", "mlp.linear_fc1"
    return [
        Weight(
            place=Place(Where.START, VISION), name="vision_model.patch_embed.proj.weight",
            rule=Copy(key="visual.patch_embed.proj.weight",
                      shape=(W, vision.in_channels, *patch)),
        ),
        *norm(f"{qkv_name}.layer_norm_", f"{block}.norm1", at_layer),
        at_layer(f"{qkv_name}.weight", qkv("weight", W)),
        at_layer(f"{qkv_name}.bias", qkv("bias", None)),
        at_layer("self_attention.linear_proj.weight",
                 RowParallel(key=f"{block}.attn.proj.weight", shape=(W, W))),
        at_layer("self_attention.linear_proj.bias",
                 Copy(key=f"{block}.attn.proj.bias", shape=(W,))),
        *norm(f"{fc1}.layer_norm_", f"{block}.norm2", at_layer),
        at_layer(f"{fc1}.weight", first("weight", W)),
        at_layer(f"{fc1}.bias", first("bias", None)),
        at_layer("mlp.linear_fc2.weight",
                 RowParallel(key=f"{second}.weight", shape=(W, F), padded=padded)),
        at_layer("mlp.linear_fc2.bias", Copy(key=f"{second}.bias", shape=(W,))),
        *norm("vision_model.decoder.final_layernorm.", f"{merger}.ln_q", at_end),
        at_end(f"{projection}.linear_fc1.weight",
               ColumnParallel(key=f"{merger}.mlp.0.weight", shape=(M, M))),
        at_end(f"{projection}.linear_fc1.bias",
               ColumnParallel(key=f"{merger}.mlp.0.bias", shape=(M,))),
        at_end(f"{projection}.linear_fc2.weight",
               RowParallel(key=f"{merger}.mlp.2.weight", shape=(out, M))),
        at_end(f"{projection}.linear_fc2.bias", Copy(key=f"{merger}.mlp.2.bias", shape=(out,))),
    ]
