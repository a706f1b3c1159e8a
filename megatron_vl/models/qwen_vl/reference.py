"""Qwen-VL in plain torch, the judge: no library has the model, and its published code is remote.

One whole sample at a time, without any parallelism, under the published names. Tests hold it part
by part against transformers' Qwen2 and torch's own MultiheadAttention.

Letters: S tokens, P patches, Q queries, N heads, H head dim, D width, C numbers of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from megatron_vl.models.family import Asked
from megatron_vl.models.registry import load_spec
from megatron_vl.models.spec import ModelSpec
from megatron_vl.weights.hf_io import weight_files

NAME = "plain torch"
_QWEN2_NAMES = {  # parts of names here -> in transformers' Qwen2
    "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm",
    "transformer.h.": "model.layers.", "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
    "attn.c_attn": "self_attn.c_attn", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def attend(q_SNH, k_PNH, v_PNH, *, causal: bool = False) -> torch.Tensor:
    """softmax(q k^T / sqrt(H)) v, [S, N*H]."""
    q, k, v = (x.transpose(0, 1) for x in (q_SNH, k_PNH, v_PNH))
    scores_NSP = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if causal:
        scores_NSP = scores_NSP + torch.full_like(scores_NSP[0], float("-inf")).triu(1)
    return (scores_NSP.softmax(-1) @ v).transpose(0, 1).flatten(1)


def resize(table_QD: torch.Tensor, patches: int) -> torch.Tensor:
    """A square table of positions for as many patches, bicubically: [P, D]."""
    stored, side = math.isqrt(len(table_QD)), math.isqrt(patches)
    if stored == side:
        return table_QD
    square = table_QD.float().T.reshape(1, -1, stored, stored)
    return F.interpolate(square, size=(side, side), mode="bicubic")[0].flatten(1).T.to(table_QD)


class VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, eps: float):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = nn.ModuleDict(
            {"in_proj": nn.Linear(width, 3 * width), "out_proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, ffn), "c_proj": nn.Linear(ffn, width)})

    def forward(self, x_PD: torch.Tensor) -> torch.Tensor:
        qkv_PN3H = self.attn["in_proj"](self.ln_1(x_PD)).unflatten(-1, (self.heads, 3, -1))
        x_PD = x_PD + self.attn["out_proj"](attend(*qkv_PN3H.unbind(2)))
        return x_PD + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x_PD))))


class Resampler(nn.Module):
    def __init__(self, queries: int, width: int, heads: int, patch_width: int, eps: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(queries, width))
        self.pos_embed = nn.Parameter(torch.empty(queries, width), requires_grad=False)
        self.kv_proj = nn.Identity()
        if patch_width != width:
            self.kv_proj = nn.Linear(patch_width, width, bias=False)
        self.ln_q, self.ln_kv = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = nn.Module()
        self.attn.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.attn.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.attn.out_proj = nn.Linear(width, width)

    def forward(self, x_PD: torch.Tensor) -> torch.Tensor:
        value = self.ln_kv(self.kv_proj(x_PD))
        key = value + resize(self.pos_embed, len(value))
        query = self.ln_q(self.query) + self.pos_embed
        weights, biases = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        qkv = [F.linear(x, weight, bias).unflatten(-1, (self.heads, -1))
               for x, weight, bias in zip((query, key, value), weights, biases, strict=True)]
        return self.attn.out_proj(attend(*qkv))


class VisionTransformer(nn.Module):
    def __init__(self, spec: ModelSpec):
        super().__init__()
        vision = spec.vision
        width, out, eps = vision.hidden_size, vision.out_hidden_size, vision.norm_eps
        patch = vision.patch_size
        self.conv1 = nn.Conv2d(vision.in_channels, width, patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(vision.num_positions, width))
        self.ln_pre = nn.LayerNorm(width, eps)
        blocks = [VisionBlock(width, vision.num_heads, vision.ffn_hidden_size, eps)
                  for _ in range(vision.depth)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.attn_pool = Resampler(vision.num_queries, out, vision.resampler_heads, width, eps)
        self.ln_post = nn.LayerNorm(out, eps)
        self.proj = nn.Parameter(torch.empty(out, out))

    def forward(self, patches_PC: torch.Tensor) -> torch.Tensor:
        """One image, [Q, D]."""
        kernel = self.conv1.kernel_size
        pixels = patches_PC.unflatten(-1, (self.conv1.in_channels, *kernel))
        x_PD = self.conv1(pixels.to(self.proj.dtype)).flatten(1)
        x_PD = self.ln_pre(x_PD + resize(self.positional_embedding, len(x_PD)))
        for block in self.transformer["resblocks"]:
            x_PD = block(x_PD)
        return self.ln_post(self.attn_pool(x_PD)) @ self.proj


class DecoderLayer(nn.Module):
    def __init__(self, spec: ModelSpec):
        super().__init__()
        decoder = spec.decoder
        width, ffn, eps = decoder.hidden_size, decoder.ffn_hidden_size, decoder.norm_eps
        self.heads, self.base = decoder.num_attention_heads, decoder.rope_theta
        self.ln_1, self.ln_2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width),
                                   "c_proj": nn.Linear(width, width, bias=False)})
        self.mlp = nn.ModuleDict({"w1": nn.Linear(width, ffn, bias=False),
                                  "w2": nn.Linear(width, ffn, bias=False),
                                  "c_proj": nn.Linear(ffn, width, bias=False)})

    def forward(self, x_SD: torch.Tensor) -> torch.Tensor:
        qkv_S3NH = self.attn["c_attn"](self.ln_1(x_SD)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv_S3NH.unbind(1)
        out = attend(self._rotated(query), self._rotated(key), value, causal=True)
        x_SD = x_SD + self.attn["c_proj"](out)
        inner = self.ln_2(x_SD)
        return x_SD + self.mlp["c_proj"](self.mlp["w1"](inner) * F.silu(self.mlp["w2"](inner)))

    def _rotated(self, x_SNH: torch.Tensor) -> torch.Tensor:
        half = x_SNH.shape[-1] // 2
        frequencies = self.base ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(len(x_SNH), dtype=torch.float32), frequencies)[:, None]
        cos, sin = angles.cos().to(x_SNH.dtype), angles.sin().to(x_SNH.dtype)
        one, two = x_SNH.chunk(2, -1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


class QwenVL(nn.Module):
    """The whole model; `from_pretrained` and `forward` as transformers' models have them."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        decoder = spec.decoder
        self.config, self.tokens = SimpleNamespace(model_type=spec.model_type), spec.tokens
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(decoder.vocab_size, decoder.hidden_size),
            "visual": VisionTransformer(spec),
            "h": nn.ModuleList([DecoderLayer(spec) for _ in range(decoder.num_layers)]),
            "ln_f": nn.RMSNorm(decoder.hidden_size, decoder.norm_eps),
        })
        self.lm_head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)
        if decoder.tie_word_embeddings:
            self.lm_head.weight = self.transformer["wte"].weight

    @classmethod
    def from_pretrained(
        cls, hf_dir: Path, dtype: torch.dtype = torch.float32, **_transformers_own
    ) -> QwenVL:
        """The model of a directory, in eval mode."""
        with torch.device("meta"):
            model = cls(load_spec(hf_dir))
        weights = {}
        for path in weight_files(Path(hf_dir)):
            weights |= _read(path)
        model.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)
        return model.eval()

    def forward(self, input_ids: torch.Tensor, pixels=(), **_transformers_own) -> SimpleNamespace:
        """Logits [1, S, V] of one sample.

        Args:
            input_ids: int64 [1, S].
            pixels: of each image its patches, float [P, C].
        """
        ids_S, inner = input_ids[0], self.transformer
        x_SD = inner["wte"](ids_S)
        starts = (ids_S == self.tokens.vision_start).nonzero().flatten().tolist()
        ends = (ids_S == self.tokens.vision_end).nonzero().flatten().tolist()
        for start, end, patches_PC in zip(starts, ends, pixels, strict=True):
            embeddings_QD = inner["visual"](patches_PC)
            x_SD = torch.cat([x_SD[: start + 1], embeddings_QD, x_SD[end:]])
        assert len(x_SD) == len(ids_S)
        for layer in inner["h"]:
            x_SD = layer(x_SD)
        return SimpleNamespace(logits=self.lm_head(inner["ln_f"](x_SD))[None])


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True, map_location="cpu")


def auto_class():
    """The class that loads a published directory."""
    return QwenVL


def inputs(spec, tokens, grids, patches, positions) -> dict:
    """What the model takes beside the tokens of one sample: the patches of each image."""
    return {"pixels": [] if patches is None else patches.split([*map(math.prod, grids)])}


def generator(hf_dir: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """For inference: transformers' Qwen2, which the language model is but for its names, and the
    tower as `visual`; with `generate`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    whole = QwenVL.from_pretrained(hf_dir, dtype)
    decoder = load_spec(hf_dir).decoder
    config = Qwen2Config(
        vocab_size=decoder.vocab_size, hidden_size=decoder.hidden_size,
        intermediate_size=decoder.ffn_hidden_size, num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.num_attention_heads,
        num_key_value_heads=decoder.num_attention_heads, rms_norm_eps=decoder.norm_eps,
        max_position_embeddings=decoder.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta},
        tie_word_embeddings=decoder.tie_word_embeddings, bos_token_id=None, eos_token_id=None,
    )
    model = Qwen2ForCausalLM.from_pretrained(
        None, config=config, state_dict=dict(_as_qwen2(whole)), dtype=dtype
    )
    model.visual = whole.transformer["visual"]
    return model


def _as_qwen2(model: QwenVL) -> Iterator[tuple[str, torch.Tensor]]:
    """The language model's weights under Qwen2's names."""
    for name, weight in model.state_dict().items():
        for own, theirs in _QWEN2_NAMES.items():
            name = name.replace(own, theirs)
        if "c_attn" in name:
            parts = zip("qkv", weight.chunk(3), strict=True)
            yield from ((name.replace("c_attn", f"{one}_proj"), part) for one, part in parts)
        elif ".visual." not in name:
            yield name, weight


def generator_inputs(model, spec, samples: Sequence[Asked], ids: torch.Tensor) -> dict:
    """What `generate` takes beside the tokens of several samples, int64 [B, S], padded on the left:
    their embeddings, with those of the images in their places."""
    places = spec.tokens.places(ids)
    if not places.any():
        return {}
    embeddings = model.get_input_embeddings()(ids)
    shown = [one for sample in samples if sample.patches is not None
             for one in sample.patches.split([*map(math.prod, sample.grids)])]
    embeddings[places] = torch.cat([model.visual(patches_PC) for patches_PC in shown])
    return {"inputs_embeds": embeddings}
