"""Let transformers answer held-out questions greedily, and count how often it is right.

    python evaluate_vqa.py HF_DIR QUESTIONS.json [--limit N] [--output answers.jsonl]

HF_DIR is loaded by transformers alone: model, tokenizer, chat template, image processor. It
has no Qwen-VL: there the project's reference, in plain torch, answers. QUESTIONS is LLaVA-style
JSON (`easy_vqa_to_llava.py` writes one). An answer is right when it is the expected text, to the
letter. Beside each score stands that of always giving the commonest answer.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

# The place of the image, with the one line break beside it, as training reads it.
MARK = re.compile(r"\n?<image>$|<image>\n?")
MAX_NEW_TOKENS = 8
SHAPES = ("circle", "rectangle", "triangle")


def group_of(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"


def read_questions(path: Path, limit: int | None, seed: int) -> list[dict]:
    """Entries of the JSON, in an order that puts questions of equal length together."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    if limit is not None and limit < len(entries):
        import random

        entries = random.Random(seed).sample(entries, limit)
    return sorted(entries, key=lambda entry: len(entry["conversations"][0]["value"]))


def content_of(question: str) -> list[dict]:
    """A question as a chat template takes it; without a mark the image comes first."""
    pieces = MARK.split(question)
    content = [] if len(pieces) > 1 else [{"type": "image"}]
    for number, text in enumerate(pieces):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": text}] if text else []
    return content


def load_rgb(path: Path):
    """The pixels training saw: upright, transparency on white, the high byte of 16-bit gray."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    elif "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class ImageAnswerer:
    """transformers' own Qwen2-VL or Qwen2.5-VL, asked in batches."""

    name = "transformers"

    def __init__(self, hf_dir: Path):
        import transformers
        from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

        class ImageAndTextProcessor(Qwen2VLProcessor):
            """The processor where torchvision, which only its video half needs, is missing."""

            def check_argument_for_proper_class(self, name, argument):
                pass

        transformers.utils.logging.disable_progress_bar()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            hf_dir, padding_side="left", trust_remote_code=False
        )
        images = transformers.AutoImageProcessor.from_pretrained(
            hf_dir, backend="pil", trust_remote_code=False
        )
        self.processor = ImageAndTextProcessor(images, self.tokenizer)
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            hf_dir, dtype="float32"
        ).eval()

    def __call__(self, entries: list[dict], root: Path) -> list[str]:
        """One answer an entry."""
        texts, images = [], []
        for entry in entries:
            content = content_of(entry["conversations"][0]["value"])
            texts.append(self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            ))
            images.append(load_rgb(root / entry["image"]))
        inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        return generated(self.model, self.tokenizer, inputs)


class TextAnswerer:
    """transformers' own language model, asked in batches."""

    name = "transformers"

    def __init__(self, hf_dir: Path):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            hf_dir, padding_side="left", trust_remote_code=False
        )
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            hf_dir, dtype="float32", trust_remote_code=False
        ).eval()

    def __call__(self, entries: list[dict], root: Path) -> list[str]:
        """One answer an entry."""
        dialogues = [[{"role": "user", "content": entry["conversations"][0]["value"]}]
                     for entry in entries]
        inputs = self.tokenizer.apply_chat_template(
            dialogues, add_generation_prompt=True, padding=True, return_tensors="pt",
            return_dict=True,
        )
        return generated(self.model, self.tokenizer, inputs)


def generated(model, tokenizer, inputs) -> list[str]:
    """What follows each of `inputs`, a batch of transformers'."""
    tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    tokens = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


class QwenVLAnswerer:
    """This project's reference of Qwen-VL, asked one by one."""

    name = "the reference in plain torch"

    def __init__(self, hf_dir: Path):
        from megatron_vl.models import family, load_spec

        spec = load_spec(hf_dir)
        of = family(spec.model_type)
        self.model = of.judge().from_pretrained(hf_dir)
        self.prompt, self.processor = of.prompt(hf_dir, spec), of.processor(hf_dir, spec)

    def __call__(self, entries: list[dict], root: Path) -> list[str]:
        """One answer an entry."""
        return [self._answer(entry, root) for entry in entries]

    def asked(self, question: str, places: int) -> list[int]:
        """The tokens that an answer follows; `places` of the image."""
        from megatron_vl.data.conversation import Part, Turn

        parts = [Part(media="image") if piece["type"] == "image" else Part(text=piece["text"])
                 for piece in content_of(question)]
        turn = Turn(role="user", parts=tuple(parts))
        tokens, _ = self.prompt.encode([turn], [False], [places], ["0.png"])
        answers = self.prompt.encoding.encode("<|im_start|>assistant\n", allowed_special="all")
        return [*tokens, *answers]

    def _answer(self, entry: dict, root: Path) -> str:
        import torch

        from megatron_vl.models.media import StoredMedia

        image = load_rgb(root / entry["image"])
        media = StoredMedia(kind="image", files=("0.png",), width=image.width, height=image.height)
        patches = self.processor.load(media, [image])
        places = self.processor.num_tokens(self.processor.shape(media))
        tokens = self.asked(entry["conversations"][0]["value"], places)
        said = []
        while len(said) < MAX_NEW_TOKENS:
            with torch.inference_mode():
                logits = self.model(torch.tensor([tokens + said]), [patches]).logits
            said.append(int(logits[0, -1].argmax()))
            if said[-1] in self.prompt.special:
                return self.prompt.decode(said[:-1]).strip()
        return self.prompt.decode(said).strip()


def answerer_of(hf_dir: Path) -> ImageAnswerer | TextAnswerer | QwenVLAnswerer:
    """What answers for the model of this directory."""
    config = json.loads((hf_dir / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") == "qwen":
        return QwenVLAnswerer(hf_dir)
    return ImageAnswerer(hf_dir) if "vision_config" in config else TextAnswerer(hf_dir)


def table(entries: list[dict], answers: list[str]) -> tuple[str, dict[str, float]]:
    """The scores as text, and by group."""
    right, total = Counter(), Counter()
    expected: dict[str, Counter] = defaultdict(Counter)
    for entry, answer in zip(entries, answers, strict=True):
        truth = entry["conversations"][1]["value"]
        groups = [group_of(truth)]
        groups += ["colour and shape"] if groups[0] != "yes/no" else []
        for group in groups:
            total[group] += 1
            right[group] += answer == truth
            expected[group][truth] += 1
    lines = [f"{'questions':<18} {'number':>7} {'right':>7} {'always the commonest answer':>28}"]
    scores = {}
    for group in ("colour", "shape", "colour and shape", "yes/no"):
        if total[group]:
            scores[group] = right[group] / total[group]
            answer, count = expected[group].most_common(1)[0]
            commonest = f"{count / total[group]:.3f} ({answer})"
            lines.append(f"{group:<18} {total[group]:>7,} {scores[group]:>7.3f} {commonest:>28}")
    return "\n".join(lines), scores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    parser.add_argument("questions", type=Path, metavar="QUESTIONS.json")
    parser.add_argument("--limit", type=int, help="ask only N questions, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of that choice (default: 0)")
    parser.add_argument("--batch-size", type=int, default=128, help="questions (default: 128)")
    parser.add_argument("--output", type=Path, help="JSONL of every answer")
    parser.add_argument(
        "--at-least", type=float, metavar="SHARE",
        help="exit 1 unless so many colour and shape questions are answered right",
    )
    args = parser.parse_args()
    for path in (args.hf_dir / "config.json", args.questions):
        if not path.is_file():
            print(f"{path} does not exist; give a Hugging Face directory and a questions JSON.",
                  file=sys.stderr)
            return 2
    if not any(args.hf_dir.glob("*.safetensors")) and not any(args.hf_dir.glob("*.bin")):
        print(f"{args.hf_dir} has a config.json but no weights of transformers; of a Megatron-Core "
              f"checkpoint, make them by megatron-vl convert {args.hf_dir} HF_DIR.",
              file=sys.stderr)
        return 2
    from tqdm import tqdm

    entries = read_questions(args.questions, args.limit, args.seed)
    answerer = answerer_of(args.hf_dir)
    started, answers = time.perf_counter(), []
    with tqdm(total=len(entries), unit="question", mininterval=5) as bar:
        for start in range(0, len(entries), args.batch_size):
            group = entries[start : start + args.batch_size]
            answers += answerer(group, args.questions.parent)
            bar.update(len(group))
    if args.output is not None:
        with args.output.open("w", encoding="utf-8") as file:
            for entry, answer in zip(entries, answers, strict=True):
                record = {"id": entry["id"], "question": entry["conversations"][0]["value"],
                          "expected": entry["conversations"][1]["value"], "answer": answer}
                file.write(json.dumps(record) + "\n")
    text, scores = table(entries, answers)
    print(text)
    print(f"{len(entries):,} held-out questions answered greedily by {answerer.name} in "
          f"{time.perf_counter() - started:.0f} s")
    if args.at_least is not None and scores.get("colour and shape", 0.0) < args.at_least:
        print(f"fewer than {args.at_least} of the colour and shape questions were answered right.",
              file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
