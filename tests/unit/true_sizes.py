"""Published sizes of the vision-language families: config.json, without weights."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_vl.models.registry import read_config_json

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
    "qwen3_vl": {
        "2B": (28, 2048, 16, 8, 6144, 151936, True, 1e-6),
        "4B": (36, 2560, 32, 8, 9728, 151936, True, 1e-6),
        "8B": (36, 4096, 32, 8, 12288, 151936, False, 1e-6),
        "32B": (64, 5120, 64, 8, 25600, 151936, False, 1e-6),
    },
    "qwen3_vl_moe": {
        "30B-A3B": (48, 2048, 32, 4, 6144, 151936, False, 1e-6),
        "235B-A22B": (94, 4096, 64, 4, 12288, 151936, False, 1e-6),
    },
}
PARAMETERS = {
    "qwen2_vl": {"2B": 2_208_985_600, "7B": 8_291_375_616, "72B": 73_405_560_320},
    "qwen2_5_vl": {
        "3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336, "72B": 73_410_777_344,
    },
    "qwen3_vl": {
        "2B": 2_127_532_032, "4B": 4_437_815_808, "8B": 8_767_123_696, "32B": 33_357_390_064,
    },
    "qwen3_vl_moe": {"30B-A3B": 31_070_754_032, "235B-A22B": 235_670_022_896},
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
    if family.startswith("qwen3_vl"):
        return _qwen3_vl(size, family)
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


def _qwen3_vl(size: str, family: str) -> dict:
    layers, hidden, heads, groups, ffn, vocab, tied, eps = SIZES[family][size]
    small = size in ("2B", "4B")
    experts = {} if family == "qwen3_vl" else {
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "moe_intermediate_size": {"30B-A3B": 768, "235B-A22B": 1536}[size], "num_experts": 128,
        "num_experts_per_tok": 8,
    }
    return {
        "architectures": [
            {"qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}[family]
            + "ForConditionalGeneration"
        ],
        "image_token_id": 151655,
        "model_type": family,
        "text_config": {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
            "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": ffn,
            "max_position_embeddings": 262144, "model_type": f"{family}_text",
            "num_attention_heads": heads, "num_hidden_layers": layers,
            "num_key_value_heads": groups, "rms_norm_eps": eps,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20],
                             "rope_type": "default"},
            "rope_theta": 5000000, "tie_word_embeddings": tied, "use_cache": True,
            "vocab_size": vocab, **experts,
        },
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17] if small else [8, 16, 24],
            "depth": 24 if small else 27, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1024 if small else 1152, "in_channels": 3, "initializer_range": 0.02,
            "intermediate_size": 4096 if small else 4304, "model_type": family,
            "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": hidden,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }  # fmt: skip


COUNTED = {  # further ones, as a tiny model's config.json with these values:
    # layers, width, heads, key/value heads, ffn, vocabulary, tied; the
    # tower's ffn; billions of numbers
    ("baichuan", "7B"): ((32, 4096, 32, 32, 11008, 125696, False), None, 7.506),
    ("qwen", "7B"): ((32, 4096, 32, 32, 11008, 151936, False), None, 9.657),
    ("qwen2", "1.5B"): ((28, 1536, 12, 2, 8960, 151936, True), None, 1.544),
    ("qwen2", "7B"): ((28, 3584, 28, 4, 18944, 152064, False), None, 7.616),
    ("qwen2", "14B"): ((48, 5120, 40, 8, 13824, 152064, False), None, 14.77),
    ("qwen2", "32B"): ((64, 5120, 40, 8, 27648, 152064, False), None, 32.764),
    ("qwen2", "72B"): ((80, 8192, 64, 8, 29568, 152064, False), None, 72.706),
    ("qwen2_5_vl", "3B"): ((36, 2048, 16, 2, 11008, 151936, True), 3420, 3.755),
    ("qwen2_5_vl", "7B"): ((28, 3584, 28, 4, 18944, 152064, False), 3420, 8.292),
    ("qwen2_5_vl", "32B"): ((64, 5120, 40, 8, 27648, 152064, False), 3456, 33.453),
    ("qwen2_5_vl", "72B"): ((80, 8192, 64, 8, 29568, 152064, False), 3456, 73.411),
    ("qwen3", "4B"): ((36, 2560, 32, 8, 9728, 151936, True), None, 4.022),
    ("qwen3", "8B"): ((36, 4096, 32, 8, 12288, 151936, False), None, 8.191),
    ("qwen3", "32B"): ((64, 5120, 64, 8, 25600, 151936, False), None, 32.762),
    ("qwen3_moe", "30B-A3B"): ((48, 2048, 32, 4, 6144, 151936, False), None, 30.532),
}
KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "vocab_size", "tie_word_embeddings")
WINDOWS = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "patch_size": 14, "window_size": 112,
           "fullatt_block_indexes": [7, 15, 23, 31]}
OTHERWISE = {  # what a family calls or counts as no other does
    "qwen": {"intermediate_size": 2 * 11008, "kv_channels": 128, "visual": {
        "heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48,
        "mlp_ratio": 4.9231, "output_dim": 4096, "patch_size": 14, "width": 1664,
    }},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
                  "moe_intermediate_size": 768},
}


def counted(tiny: Path, name: str, size: str) -> dict:
    """config.json of a size of COUNTED, from that of a tiny model of its family."""
    sizes, vision_ffn, _ = COUNTED[name, size]
    config = read_config_json(tiny) | dict(zip(KEYS, sizes, strict=True)) | OTHERWISE.get(name, {})
    if vision_ffn:
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
        config["vision_config"] |= WINDOWS | {
            "intermediate_size": vision_ffn, "out_hidden_size": config["hidden_size"],
        }
    return config


def write(directory: Path, size: str, family: str = "qwen2_vl") -> Path:
    """A directory that holds the config.json of this size alone."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(published(size, family)))
    return directory
