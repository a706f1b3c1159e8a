"""A tiny Qwen2."""

from __future__ import annotations

from megatron_vl.models.common.tiny_decoder import qwen2_decoder
from megatron_vl.models.common.tiny_tokenizer import qwen2_vocabulary
from megatron_vl.models.tiny import TinySizes

TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def files(sizes: TinySizes) -> dict[str, object]:
    """The files of its directory, without weights."""
    vocabulary = qwen2_vocabulary(sizes, TEMPLATE)
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return {"config.json": config | qwen2_decoder(sizes, vocabulary), **vocabulary.files}
