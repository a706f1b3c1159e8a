"""A tiny random Qwen2-VL for tests, and a plain reference of its Megatron-Core form.

The reference is written independently of `megatron_vl.weights`: whole tensors in memory, one loop,
no rules. Letters: N heads, G key/value heads, D head width.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_vl.cli.main import run
from megatron_vl.models import family, load_spec
from megatron_vl.models.tiny import random_weights

ROOT = Path(__file__).resolve().parents[2]


def make(out: Path, *options: str, vocab_size: int | None = None) -> Path:
    """Writes a checkpoint (64 wide, 4 + 2 layers); `vocab_size` overrides the tokenizer's."""
    sizes = ["--hidden-size", "64", "--ffn-size", "96", "--vision-hidden-size", "32",
             "--vision-heads", "4", "--ranks", "260", "--init-std", "0.5"]
    assert run(["tiny", str(out), *sizes, *options]) == 0
    if vocab_size is not None:
        config = json.loads((out / "config.json").read_text())
        config["vocab_size"] = vocab_size
        (out / "config.json").write_text(json.dumps(config))
        write_weights(out)
    return out


def write_weights(directory: Path, seed: int = 0) -> None:
    """New random ones for the config.json that lies there."""
    spec = load_spec(directory)
    drawn = random_weights(family(spec.model_type).weight_map(spec), spec, seed)
    save_file(drawn, directory / "model.safetensors")


def read(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def read_mcore(directory: Path) -> dict[str, dict]:
    """{"mp_rank_..": the content of its file}, by torch alone."""
    return {
        path.parent.name: torch.load(path, weights_only=False)
        for path in sorted((directory / "release").glob("mp_rank_*/model_optim_rng.pt"))
    }


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """The same names, and every tensor equal bit by bit."""
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name


def reference_tensors(hf: dict[str, torch.Tensor], config: dict) -> list[tuple]:
    """(mcore name with the layer's global number, tensor, how TP cuts it, tower, layer)."""
    N, G = config["num_attention_heads"], config["num_key_value_heads"]
    D = config["hidden_size"] // N
    A = config["vision_config"]["num_heads"]
    found = []

    def llm_qkv(layer: str, leaf: str) -> torch.Tensor:
        q, k, v = (hf[f"{layer}.self_attn.{x}_proj.{leaf}"] for x in "qkv")
        rows = []
        for g in range(G):
            for n in range(g * N // G, (g + 1) * N // G):
                rows.append(q[n * D : (n + 1) * D])
            rows.append(k[g * D : (g + 1) * D])
            rows.append(v[g * D : (g + 1) * D])
        return torch.cat(rows)

    def vit_qkv(name: str) -> torch.Tensor:
        q, k, v = hf[name].chunk(3)
        return torch.cat([x.chunk(A)[a] for a in range(A) for x in (q, k, v)])

    for i in range(config["vision_config"]["depth"]):
        a, b = f"visual.blocks.{i}", f"vision_model.decoder.layers.{i}"
        for norm, fused in (("norm1", "self_attention.linear_qkv"), ("norm2", "mlp.linear_fc1")):
            for leaf in ("weight", "bias"):
                found.append((f"{b}.{fused}.layer_norm_{leaf}", hf[f"{a}.{norm}.{leaf}"], None,
                              "vit", i))
        for leaf in ("weight", "bias"):
            found += [
                (f"{b}.self_attention.linear_qkv.{leaf}", vit_qkv(f"{a}.attn.qkv.{leaf}"), 0,
                 "vit", i),
                (f"{b}.mlp.linear_fc1.{leaf}", hf[f"{a}.mlp.fc1.{leaf}"], 0, "vit", i),
                (f"{b}.self_attention.linear_proj.{leaf}", hf[f"{a}.attn.proj.{leaf}"],
                 1 if leaf == "weight" else None, "vit", i),
                (f"{b}.mlp.linear_fc2.{leaf}", hf[f"{a}.mlp.fc2.{leaf}"],
                 1 if leaf == "weight" else None, "vit", i),
            ]
    found.append(("vision_model.patch_embed.proj.weight", hf["visual.patch_embed.proj.weight"],
                  None, "first", 0))
    for leaf in ("weight", "bias"):
        found += [
            (f"vision_model.decoder.final_layernorm.{leaf}", hf[f"visual.merger.ln_q.{leaf}"],
             None, "merger", 0),
            (f"vision_model.projection.encoder.linear_fc1.{leaf}",
             hf[f"visual.merger.mlp.0.{leaf}"], 0, "merger", 0),
            (f"vision_model.projection.encoder.linear_fc2.{leaf}",
             hf[f"visual.merger.mlp.2.{leaf}"], 1 if leaf == "weight" else None, "merger", 0),
        ]
    for i in range(config["num_hidden_layers"]):
        a, b = f"model.layers.{i}", f"language_model.decoder.layers.{i}"
        gate_up = (hf[f"{a}.mlp.gate_proj.weight"], hf[f"{a}.mlp.up_proj.weight"])
        found += [
            (f"{b}.self_attention.linear_qkv.layer_norm_weight",
             hf[f"{a}.input_layernorm.weight"], None, "llm", i),
            (f"{b}.self_attention.linear_qkv.weight", llm_qkv(a, "weight"), 0, "llm", i),
            (f"{b}.self_attention.linear_qkv.bias", llm_qkv(a, "bias"), 0, "llm", i),
            (f"{b}.self_attention.linear_proj.weight", hf[f"{a}.self_attn.o_proj.weight"], 1,
             "llm", i),
            (f"{b}.mlp.linear_fc1.layer_norm_weight",
             hf[f"{a}.post_attention_layernorm.weight"], None, "llm", i),
            (f"{b}.mlp.linear_fc1.weight", gate_up, "swiglu", "llm", i),
            (f"{b}.mlp.linear_fc2.weight", hf[f"{a}.mlp.down_proj.weight"], 1, "llm", i),
        ]
    embedding = hf["model.embed_tokens.weight"]
    found += [
        ("language_model.embedding.word_embeddings.weight", embedding, "vocab", "merger", 0),
        ("language_model.decoder.final_layernorm.weight", hf["model.norm.weight"], None, "last", 0),
        ("language_model.output_layer.weight", hf.get("lm_head.weight", embedding), "vocab",
         "last" if "lm_head.weight" in hf else "tied", 0),
    ]
    return found


def cut(tensor, how, tp: int, rank: int) -> torch.Tensor:
    """TP rank `rank`'s part of a reference tensor."""
    if how is None:
        return tensor
    if how == "swiglu":
        return torch.cat([part.chunk(tp)[rank] for part in tensor])
    if how == "vocab":
        padding = -len(tensor) % tp
        tensor = torch.cat([tensor, tensor.new_zeros(padding, tensor.shape[1])])
        how = 0
    return tensor.chunk(tp, dim=how)[rank]


def reference_ranks(
    hf: dict, config: dict, *, tp: int, llm: list[list[int]], vit: list[list[int]]
) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """{"mp_rank_..": {"model" or "model0"..: {name: shard}}}; `llm[chunk][stage]` layer counts."""
    pp, vp = len(llm[0]), len(llm)
    order = [(c, s) for c in range(vp) for s in range(pp)]
    home = {}  # (tower, global layer) -> (chunk, stage, local layer)
    for tower, counts in (("llm", llm), ("vit", vit)):
        at = 0
        for c, s in order:
            for local in range(counts[c][s]):
                home[tower, at] = (c, s, local)
                at += 1
    ends = [(c, s) for c, s in order if vit[c][s]]
    merger = ends[-1] if ends else (0, 0)
    places = {"first": (0, 0), "merger": merger, "last": (vp - 1, pp - 1)}
    ranks = {}
    for rank in range(tp):
        for stage in range(pp):
            suffix = f"_{stage:03d}" if pp > 1 else ""
            ranks[f"mp_rank_{rank:02d}{suffix}"] = {
                (f"model{c}" if vp > 1 else "model"): {} for c in range(vp)
            }
    for name, tensor, how, place, layer in reference_tensors(hf, config):
        if place in ("llm", "vit"):
            chunk, stage, local = home[place, layer]
            name = name.replace(f".layers.{layer}.", f".layers.{local}.")
        elif place == "tied":
            chunk, stage = places["last"]
            if (chunk, stage) == merger:
                continue
        else:
            chunk, stage = places[place]
        for rank in range(tp):
            suffix = f"_{stage:03d}" if pp > 1 else ""
            part = f"model{chunk}" if vp > 1 else "model"
            ranks[f"mp_rank_{rank:02d}{suffix}"][part][name] = cut(tensor, how, tp, rank)
    return ranks
