"""The judge: transformers' Llama, which Baichuan2-7B is but for W_pack and NormHead.

Its modules are those that the published weights are named after.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

PACKED, HEAD = "W_pack", "lm_head.weight"


class Part(torch.nn.Module):
    """The queries, keys or values of an attention that projects them as one."""

    def __init__(self, attention: torch.nn.Module, number: int):
        super().__init__()
        self.of, self.number = [attention], number  # in a list: it is no part of this

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.of[0].W_pack(x).chunk(3, dim=-1)[self.number]


class NormHead(torch.nn.Linear):
    """Multiplies with the direction of each row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, F.normalize(self.weight))


class Judge(LlamaForCausalLM):
    """transformers' Llama with Baichuan2's layers."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        width = config.hidden_size
        for layer in self.model.layers:
            attention = layer.self_attn
            attention.W_pack = torch.nn.Linear(width, 3 * width, bias=False)
            for number, one in enumerate("qkv"):
                setattr(attention, f"{one}_proj", Part(attention, number))
        self.lm_head = NormHead(width, config.vocab_size, bias=False)

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
        of_llama = {key: value for key, value in config.items()
                    if key in LlamaConfig().to_dict() and key != "model_type"}
        model = cls(LlamaConfig(**of_llama | {"attn_implementation": attn_implementation}))
        model.load_state_dict({name: weight for name, weight in found.items()
                               if not name.endswith("rotary_emb.inv_freq")})  # in older files
        model.config.model_type = config["model_type"]
        return model.to(dtype).eval()

    def of_llama(self) -> dict[str, torch.Tensor]:
        """Llama's weights: q, k and v cut out of W_pack, the head normalised."""
        weights = {}
        for name, weight in self.state_dict().items():
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
    judge.config.model_type = "llama"
    return LlamaForCausalLM.from_pretrained(
        None, config=judge.config, state_dict=judge.of_llama(), dtype=dtype
    )
