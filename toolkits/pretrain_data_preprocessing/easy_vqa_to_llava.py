"""Write the easy-VQA data set as LLaVA-style JSON and image files.

    python easy_vqa_to_llava.py OUT [--max-images N] [--yes-no-per-image N] [--image-size N]

OUT/train.json and OUT/test.json hold `[{id, image, conversations}, ...]`, OUT/train-shape.json the
training questions that ask for the shape; OUT/images holds the PNG files of the PyPI package
`easy-vqa` (MIT), 64 x 64, byte for byte; with --image-size enlarged, as JPEG, to sizes around N as
photos have them. Every question is one entry.
"""

import argparse
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

SHAPES = ("circle", "rectangle", "triangle")


def kind_of(answer: str) -> str:
    """What a question asks for: "yes-no", "shape" or "colour"."""
    if answer in ("yes", "no"):
        return "yes-no"
    return "shape" if answer in SHAPES else "colour"


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


def write_json(path: Path, entries: list[dict]) -> None:
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
    parser.add_argument("--image-size", metavar="N", type=int, help="enlarge to about N x N pixels")
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
        folder = args.out / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        extension = "png" if args.image_size is None else "jpg"
        kept = set(sorted(images)[: args.max_images])
        for number in sorted(kept):
            target = folder / f"{number}.{extension}"
            if args.image_size is None:
                shutil.copyfile(images[number], target)
            else:
                enlarge(images[number], target, args.image_size)
        entries = entries_of(split, questions, kept, extension)
        if split == "train":
            shapes = [entry for entry in entries if kind_of(answer_of(entry)) == "shape"]
            write_json(args.out / "train-shape.json", shapes)
            if args.yes_no_per_image is not None:
                entries = thin_yes_no(entries, args.yes_no_per_image, args.seed)
        write_json(args.out / f"{split}.json", entries)
    return 0


if __name__ == "__main__":
    sys.exit(main())
