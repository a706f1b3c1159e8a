"""Write the easy-VQA data set as LLaVA-style JSON and image files.

    python easy_vqa_to_llava.py OUT [--max-images N] [--yes-no-per-image N]
        [--image-size N | --text]

OUT/train.json and OUT/test.json hold `[{id, image, conversations}, ...]`, OUT/train-shape.json the
training questions that ask for the shape; a test question also has its `groups`, for `megatron-vl
evaluate --group-by groups`. OUT/images holds the PNG files of the PyPI package
`easy-vqa` (MIT), 64 x 64, byte for byte; with --image-size enlarged, as JPEG, to sizes around N as
photos have them. Every question is one entry.

With --text a sentence in the question stands for the image, for models that take text alone. Images
of which no question tells the shape, or the colour, are left out.
"""

import argparse
import json
import random
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

SHAPES = ("circle", "rectangle", "triangle")


def kind_of(answer: str) -> str:
    """What a question asks for: "yes-no", "shape" or "colour"."""
    if answer in ("yes", "no"):
        return "yes-no"
    return "shape" if answer in SHAPES else "colour"


def groups_of(answer: str) -> list[str]:
    """Under which names `megatron-vl evaluate` counts a question."""
    kind = kind_of(answer)
    return ["yes/no"] if kind == "yes-no" else [kind, "colour and shape"]


def entries_of(split: str, questions, kept: set[int], extension: str) -> list[dict]:
    """LLaVA entries of the questions about the images `kept`.

    Args:
        questions: texts, answers and image ids, one each a question.
    """
    return [
        {
            "id": f"{split}-{image}-{index}",
            "image": f"images/{split}/{image}.{extension}",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for index, (question, answer, image) in enumerate(zip(*questions, strict=True))
        if image in kept
    ]


def descriptions(questions) -> dict[int, str]:
    """A sentence about each image of which questions tell the shape and the colour.

    Args:
        questions: as `entries_of` takes them.
    """
    told: dict[int, dict[str, str]] = defaultdict(dict)
    for _, answer, image in zip(*questions, strict=True):
        told[image][kind_of(answer)] = answer
    return {image: f"The image shows one {of['colour']} {of['shape']}."
            for image, of in told.items() if {"colour", "shape"} <= of.keys()}


def in_words(entry: dict, told: dict[int, str]) -> dict:
    """An entry whose question describes the image that it had."""
    asked, answer = entry["conversations"]
    description = told[int(Path(entry["image"]).stem)]
    asked = asked | {"value": asked["value"].replace("<image>", description)}
    left = {key: value for key, value in entry.items() if key != "image"}
    return left | {"conversations": [asked, answer]}


def answer_of(entry: dict) -> str:
    return entry["conversations"][1]["value"]


def thin_yes_no(entries: list[dict], per_image: int, seed: int) -> list[dict]:
    """All other questions and, of every image, at most `per_image` yes/no questions at random."""
    order = list(range(len(entries)))
    random.Random(seed).shuffle(order)
    seen: Counter[str] = Counter()
    kept = set()
    for at in order:
        if kind_of(answer_of(entries[at])) == "yes-no":
            seen[entries[at]["image"]] += 1
            if seen[entries[at]["image"]] > per_image:
                continue
        kept.add(at)
    return [entry for at, entry in enumerate(entries) if at in kept]


def enlarge(source: str, target: Path, size: int) -> None:
    """An image of another size and shape, the same each time: sides of 0.75 to 1.5 times `size`."""
    from PIL import Image

    draw = random.Random(target.stem)
    width, height = (round(size * draw.uniform(0.75, 1.5)) for _ in range(2))
    with Image.open(source) as image:
        image.convert("RGB").resize((width, height)).save(target, "JPEG", quality=90)


def write_images(images: dict[int, str], kept: set[int], folder: Path, size: int | None) -> None:
    """Those of `kept`; as they are, or enlarged to about `size`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in sorted(kept):
        if size is None:
            shutil.copyfile(images[number], folder / f"{number}.png")
        else:
            enlarge(images[number], folder / f"{number}.jpg", size)


def write_json(path: Path, entries: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=0) + "\n", encoding="utf-8")
    kinds = Counter(kind_of(answer_of(entry)) for entry in entries)
    print(f"{path}: {len(entries)} questions ("
          + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) + ")")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write")
    parser.add_argument(
        "--max-images", metavar="N", type=int, help="only the first N of each split"
    )
    parser.add_argument(
        "--yes-no-per-image", metavar="N", type=int,
        help="keep at most N yes/no questions of each training image (default: all)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--image-size", metavar="N", type=int, help="enlarge to about N x N pixels")
    form.add_argument("--text", action="store_true", help="describe the images, show none")
    parser.add_argument("--seed", type=int, default=0, help="of that choice (default: 0)")
    args = parser.parse_args()
    try:
        import easy_vqa
    except ImportError:
        print("the package easy-vqa is missing; `pip install easy-vqa`.", file=sys.stderr)
        return 2
    for split, questions, images in (
        ("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        ("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    ):
        kept = set(sorted(images)[: args.max_images])
        if args.text:
            told = descriptions(questions)
            kept &= told.keys()
        else:
            write_images(images, kept, args.out / "images" / split, args.image_size)
        entries = entries_of(split, questions, kept, "png" if args.image_size is None else "jpg")
        if split == "test":
            entries = [one | {"groups": groups_of(answer_of(one))} for one in entries]
        made = {split: entries}
        if split == "train":
            made["train-shape"] = [one for one in entries if kind_of(answer_of(one)) == "shape"]
            if args.yes_no_per_image is not None:
                made["train"] = thin_yes_no(entries, args.yes_no_per_image, args.seed)
        for name, entries in made.items():
            if args.text:
                entries = [in_words(entry, told) for entry in entries]
            write_json(args.out / f"{name}.json", entries)
    return 0


if __name__ == "__main__":
    sys.exit(main())
