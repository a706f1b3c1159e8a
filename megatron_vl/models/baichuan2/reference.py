"""The judge: transformers' Llama, which Baichuan2-7B is but for W_pack and NormHead.

It keeps the published weights and makes Llama's of them at every call, so that gradients reach them
under their published names.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

PACKED, HEAD = "W_pack", "lm_head.weight"


class Judge(torch.nn.Module):
    """transformers' Llama, of Baichuan2's weights."""

    def __init__(self, config: dict, weights: dict[str, torch.Tensor], attention: str):
        super().__init__()
        of_llama = {key: value for key, value in config.items() if key in LlamaConfig().to_dict()}
        self.config = LlamaConfig(**of_llama | {"attn_implementation": attention})
        self.config.model_type = config["model_type"]
        self.llama = LlamaForCausalLM(self.config)
        self.published = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, dtype: torch.dtype = torch.float32,
        attn_implementation: str = "eager", **_of_other_judges,
    ) -> Judge:
        """Of a published directory."""
        directory = Path(directory)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        found: dict[str, torch.Tensor] = {}
        for file in directory.glob("*.safetensors"):
            found |= load_file(file)
        for file in directory.glob("pytorch_model*.bin"):
            found |= torch.load(file, weights_only=True)
        weights = {name: weight.to(dtype) for name, weight in found.items()
                   if not name.endswith("rotary_emb.inv_freq")}  # no weight, in older files
        return cls(config, weights, attn_implementation)

    def named_parameters(self, *args, **kwargs):
        """The published ones."""
        return iter(self.published.items())

    def forward(self, **inputs):
        weights = self.of_llama()
        assert weights.keys() == dict(self.llama.named_parameters()).keys(), weights.keys()
        return functional_call(self.llama, weights, kwargs=inputs)

    def of_llama(self) -> dict[str, torch.Tensor]:
        """Llama's weights: q, k and v cut out of W_pack, the head normalised."""
        weights = {}
        for name, weight in self.published.items():
            if PACKED in name:
                parts = zip("qkv", weight.chunk(3), strict=True)
                weights |= {name.replace(PACKED, f"{one}_proj"): part for one, part in parts}
            else:
                weights[name] = F.normalize(weight) if name == HEAD else weight
        return weights


def auto_class() -> type[Judge]:
    """What loads a published directory."""
    return Judge


def generator(directory: Path, *, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same as a Llama of its own, with `generate`; for inference."""
    judge = Judge.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
    with torch.no_grad():
        weights = judge.of_llama()
    judge.config.model_type = "llama"
    return LlamaForCausalLM.from_pretrained(
        None, config=judge.config, state_dict=weights, dtype=dtype
    )
