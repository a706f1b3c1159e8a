"""config.json and chat template of a tiny Qwen3 decoder."""

from __future__ import annotations

from megatron_vl.models.common.tiny_decoder import qwen2_decoder
from megatron_vl.models.common.tiny_tokenizer import Vocabulary
from megatron_vl.models.tiny import TinySizes

TEMPLATE = (  # of those that do not think
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def qwen3_decoder(sizes: TinySizes, vocabulary: Vocabulary) -> dict:
    """The keys of the language model; its heads together are wider than the residual stream."""
    return qwen2_decoder(sizes, vocabulary) | {
        "attention_bias": False, "head_dim": 2 * sizes.hidden_size // sizes.num_heads,
    }


def qwen3_experts(sizes: TinySizes) -> dict:
    """Four experts a layer, of which a token goes to two; these work as much as an MLP would."""
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes.ffn_size // 2,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
