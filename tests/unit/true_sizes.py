"""Qwen2-VL's published sizes: config.json, without weights."""

from __future__ import annotations

import json
from pathlib import Path

SIZES = {  # layers, hidden, heads, key/value heads, ffn, vocabulary, tied, norm eps
    "2B": (28, 1536, 12, 2, 8960, 151936, True, 1e-6),
    "7B": (28, 3584, 28, 4, 18944, 152064, False, 1e-6),
    "72B": (80, 8192, 64, 8, 29568, 152064, False, 1e-5),
}
PARAMETERS = {"2B": 2_208_985_600, "7B": 8_291_375_616, "72B": 73_405_560_320}


def published(size: str) -> dict:
    """config.json as it was published with the instruction-tuned model of this size."""
    layers, hidden, heads, groups, ffn, vocab, tied, eps = SIZES[size]
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "rms_norm_eps": eps,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
            "hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocab,
    }
    return config


def write(directory: Path, size: str) -> Path:
    """A directory that holds the config.json of this size alone."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(published(size)))
    return directory
