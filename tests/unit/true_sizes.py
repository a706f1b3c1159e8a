"""Published sizes of the vision-language families: config.json, without weights."""

from __future__ import annotations

import json
from pathlib import Path

SIZES = {  # layers, hidden, heads, key/value heads, ffn, vocabulary, tied, norm eps
    "qwen2_vl": {
        "2B": (28, 1536, 12, 2, 8960, 151936, True, 1e-6),
        "7B": (28, 3584, 28, 4, 18944, 152064, False, 1e-6),
        "72B": (80, 8192, 64, 8, 29568, 152064, False, 1e-5),
    },
    "qwen2_5_vl": {
        "3B": (36, 2048, 16, 2, 11008, 151936, True, 1e-6),
        "7B": (28, 3584, 28, 4, 18944, 152064, False, 1e-6),
        "32B": (64, 5120, 40, 8, 27648, 152064, False, 1e-6),
        "72B": (80, 8192, 64, 8, 29568, 152064, False, 1e-5),
    },
}
PARAMETERS = {
    "qwen2_vl": {"2B": 2_208_985_600, "7B": 8_291_375_616, "72B": 73_405_560_320},
    "qwen2_5_vl": {
        "3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336, "72B": 73_410_777_344,
    },
}  # fmt: skip


def _vision(family: str, size: str) -> dict:
    """The keys of vision_config in which families differ."""
    hidden = SIZES[family][size][1]
    if family == "qwen2_vl":
        return {"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": hidden}
    return {
        "hidden_size": 1280, "intermediate_size": 3420 if size in ("3B", "7B") else 3456,
        "out_hidden_size": hidden, "hidden_act": "silu", "tokens_per_second": 2,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip


def published(size: str, family: str = "qwen2_vl") -> dict:
    """config.json as it was published with the instruction-tuned model of this size."""
    layers, hidden, heads, groups, ffn, vocab, tied, eps = SIZES[family][size]
    return {
        "architectures": [
            {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[family]
            + "ForConditionalGeneration"
        ],
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
        "max_position_embeddings": {"qwen2_vl": 32768, "qwen2_5_vl": 128000}[family],
        "max_window_layers": layers,
        "model_type": family,
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
            "depth": 32, "num_heads": 16, "in_chans": 3, "patch_size": 14,
            "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
            **_vision(family, size),
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocab,
    }  # fmt: skip


def write(directory: Path, size: str, family: str = "qwen2_vl") -> Path:
    """A directory that holds the config.json of this size alone."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(published(size, family)))
    return directory
