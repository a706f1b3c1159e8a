"""A tiny Qwen3."""

from __future__ import annotations

from megatron_vl.models.common.tiny_qwen3 import TEMPLATE, qwen3_decoder
from megatron_vl.models.common.tiny_tokenizer import qwen2_vocabulary
from megatron_vl.models.tiny import TinySizes


def files(sizes: TinySizes) -> dict[str, object]:
    """The files of its directory, without weights."""
    vocabulary = qwen2_vocabulary(sizes, TEMPLATE)
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    return {"config.json": config | qwen3_decoder(sizes, vocabulary), **vocabulary.files}
