"""config.json of a tiny Qwen2 decoder."""

from __future__ import annotations

from megatron_vl.models.common.tiny_tokenizer import Vocabulary
from megatron_vl.models.tiny import TinySizes


def qwen2_decoder(sizes: TinySizes, vocabulary: Vocabulary) -> dict:
    """The keys of the language model, as Qwen2 was published with."""
    return {
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary.ids["<|endoftext|>"],
        "eos_token_id": vocabulary.ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": sizes.init_std,
        "intermediate_size": sizes.ffn_size,
        "max_position_embeddings": sizes.max_positions,
        "max_window_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": sizes.max_positions,
        "tie_word_embeddings": not sizes.untied,
        "torch_dtype": sizes.dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary.size,
    }
