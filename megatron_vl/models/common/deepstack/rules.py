"""The weights of Qwen3-VL's tower, under its published names and under Megatron-Core's.

W vision width, F width of the tower's MLP, M merged width (W x merge^2), A heads of the tower.
"""

from __future__ import annotations

from megatron_vl.models.common.deepstack.vision_spec import DeepstackVisionSpec
from megatron_vl.parallel import VISION
from megatron_vl.weights.map import Place, Weight, Where
from megatron_vl.weights.rules import ColumnParallel, Copy, FusedQKV, RowParallel, Rule

TOWER = "model.visual"


def tower_weights(vision: DeepstackVisionSpec) -> list[Weight]:
    """Every weight of the tower and of its mergers."""
    W, F, A = vision.hidden_size, vision.ffn_hidden_size, vision.num_heads
    patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    block, layer = f"{TOWER}.blocks.{{i}}", "vision_model.decoder.layers.{i}"
    attention = f"{layer}.self_attention"

    def qkv(leaf: str, columns: int | None) -> FusedQKV:
        return FusedQKV(key=f"{block}.attn.qkv.{leaf}", heads=A, head_dim=vision.head_dim,
                        columns=columns)

    start, layers, end = (Place(where, VISION) for where in (Where.START, Where.LAYER, Where.END))
    embedding = {
        "patch_embed.proj.weight": (W, vision.in_channels, *patch),
        "patch_embed.proj.bias": (W,),
        "pos_embed.weight": (vision.num_positions, W),
    }
    of_layer = {
        **_norm(f"{attention}.linear_qkv.layer_norm_", f"{block}.norm1.", W),
        f"{attention}.linear_qkv.weight": qkv("weight", W),
        f"{attention}.linear_qkv.bias": qkv("bias", None),
        **_second(f"{attention}.linear_proj", f"{block}.attn.proj", (W, W)),
        **_norm(f"{layer}.mlp.linear_fc1.layer_norm_", f"{block}.norm2.", W),
        **_mlp(f"{layer}.mlp", f"{block}.mlp", (W, F, W)),
    }
    merged, out = vision.merged_size, vision.out_hidden_size
    mergers = {
        **_norm("vision_model.decoder.final_layernorm.", f"{TOWER}.merger.norm.", W),
        **_mlp("vision_model.projection.encoder", f"{TOWER}.merger", (merged, merged, out)),
    }
    for number in range(vision.num_features):
        ours = f"vision_model.deepstack.{number}"
        theirs = f"{TOWER}.deepstack_merger_list.{number}"
        mergers |= {
            **_norm(f"{ours}.norm.", f"{theirs}.norm.", merged),
            **_mlp(f"{ours}.projection.encoder", theirs, (merged, merged, out)),
        }
    return [
        *(Weight(place=start, name=f"vision_model.{name}",
                 rule=Copy(key=f"{TOWER}.{name}", shape=shape))
          for name, shape in embedding.items()),
        *(Weight(place=layers, name=name, rule=rule) for name, rule in of_layer.items()),
        *(Weight(place=end, name=name, rule=rule) for name, rule in mergers.items()),
    ]


def _norm(ours: str, theirs: str, width: int) -> dict[str, Rule]:
    """A LayerNorm; the names end where those of its leaves begin."""
    return {f"{ours}{leaf}": Copy(key=f"{theirs}{leaf}", shape=(width,))
            for leaf in ("weight", "bias")}


def _mlp(ours: str, theirs: str, widths: tuple[int, int, int]) -> dict[str, Rule]:
    """Two linear layers: from the first width to the second, and on to the third."""
    into, inner, out = widths
    first = f"{theirs}.linear_fc1"
    return {
        f"{ours}.linear_fc1.weight": ColumnParallel(key=f"{first}.weight", shape=(inner, into)),
        f"{ours}.linear_fc1.bias": ColumnParallel(key=f"{first}.bias", shape=(inner,)),
        **_second(f"{ours}.linear_fc2", f"{theirs}.linear_fc2", (out, inner)),
    }


def _second(ours: str, theirs: str, shape: tuple[int, int]) -> dict[str, Rule]:
    """A linear layer whose input tensor parallelism has cut."""
    return {f"{ours}.weight": RowParallel(key=f"{theirs}.weight", shape=shape),
            f"{ours}.bias": Copy(key=f"{theirs}.bias", shape=shape[:1])}
