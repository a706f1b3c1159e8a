"""A tiny Qwen-VL. Its tower stores 16 x 16 positions, as published."""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING

from megatron_vl.errors import InputError
from megatron_vl.models.common.tiny_tokenizer import PUBLISHED_RANKS, PUBLISHED_ROWS, read_ranks
from megatron_vl.models.qwen_vl.config import RESAMPLER_HEAD
from megatron_vl.models.qwen_vl.tokenizer import IMAGE_START, MARKS
from megatron_vl.models.spec import ModelSpec
from megatron_vl.models.tiny import TinySizes

if TYPE_CHECKING:
    import torch

IMAGE_SIZE = 448  # pixels a side
DEFAULTS = {
    "hidden_size": 4 * RESAMPLER_HEAD,  # TP divides the resampler's heads
    "num_kv_heads": 4, "untied": True, "max_positions": 8192,
    "min_pixels": IMAGE_SIZE**2, "max_pixels": IMAGE_SIZE**2,
}


def files(sizes: TinySizes) -> dict[str, object]:
    """The files of its directory, without weights.

    Raises:
        InputError: sizes that no Qwen-VL has.
    """
    image_size = math.isqrt(sizes.max_pixels)
    for wrong, says in (
        (sizes.num_kv_heads != sizes.num_heads,
         f"--num-kv-heads is {sizes.num_kv_heads}; Qwen-VL has as many as --num-heads, "
         f"{sizes.num_heads}"),
        (sizes.hidden_size % RESAMPLER_HEAD,
         f"--hidden-size is {sizes.hidden_size}; the heads of Qwen-VL's resampler are "
         f"{RESAMPLER_HEAD} wide, so give a multiple of that"),
        (sizes.min_pixels != sizes.max_pixels or image_size**2 != sizes.max_pixels,
         f"--min-pixels is {sizes.min_pixels} and --max-pixels {sizes.max_pixels}; every image of "
         f"Qwen-VL has one size, a square: give the same square number for both"),
    ):
        if wrong:
            raise InputError(f"{says}.")
    ranks = read_ranks(sizes.ranks)
    end = len(ranks)  # <|endoftext|>
    rows = math.ceil((end + len(MARKS)) / 128) * 128
    return {
        "config.json": {
            "architectures": ["QWenLMHeadModel"],
            "attn_dropout_prob": 0.0,
            "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig",
                         "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
            "bf16": sizes.dtype == "bfloat16",
            "fp16": sizes.dtype == "float16",
            "fp32": sizes.dtype == "float32",
            "emb_dropout_prob": 0.0,
            "hidden_size": sizes.hidden_size,
            "initializer_range": sizes.init_std,
            "intermediate_size": 2 * sizes.ffn_size,
            "kv_channels": sizes.hidden_size // sizes.num_heads,
            "layer_norm_epsilon": 1e-06,
            "max_position_embeddings": sizes.max_positions,
            "model_type": "qwen",
            "no_bias": True,
            "num_attention_heads": sizes.num_heads,
            "num_hidden_layers": sizes.num_layers,
            "onnx_safe": None,
            "rotary_emb_base": 10000,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "seq_length": 2048,
            "tie_word_embeddings": not sizes.untied,
            "tokenizer_type": "QWenTokenizer",
            "torch_dtype": sizes.dtype,
            "use_cache": True,
            "use_dynamic_ntk": True,
            "use_flash_attn": False,
            "use_logn_attn": True,
            "visual": {
                "heads": sizes.vision_heads,
                "image_size": image_size,
                "image_start_id": end + MARKS.index(IMAGE_START),
                "layers": sizes.vision_depth,
                "mlp_ratio": sizes.vision_mlp_ratio,
                "n_queries": sizes.vision_queries,
                "output_dim": sizes.hidden_size,
                "patch_size": sizes.patch_size,
                "width": sizes.vision_hidden_size,
            },
            "vocab_size": PUBLISHED_ROWS if end == PUBLISHED_RANKS else rows,
        },
        "generation_config.json": {
            "chat_format": "chatml", "do_sample": False, "eos_token_id": end,
            "max_window_size": 6144, "pad_token_id": end,
        },
        "qwen.tiktoken": "".join(
            f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()
        ),
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
            "model_max_length": sizes.max_positions,
            "tokenizer_class": "QWenTokenizer",
        },
    }


def constants(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The positions of the resampler, which no training changes, are sines as published."""
    from megatron_vl.models.qwen_vl.positional_table import sine_table

    vision = spec.vision
    return {"transformer.visual.attn_pool.pos_embed": sine_table(
        math.isqrt(vision.num_queries), vision.out_hidden_size
    )}
