"""Write the easy-VQA data set as LLaVA-style JSON and image files.

    python easy_vqa_to_llava.py OUT [--max-images N]

OUT/train.json and OUT/test.json hold `[{id, image, conversations}, ...]`; OUT/images holds the PNG
files of the PyPI package `easy-vqa` (MIT), byte for byte. Every question is one entry.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path


def write_split(out: Path, split: str, questions, images: dict[int, str], limit: int | None) -> int:
    """Write one split's JSON and images; returns its number of questions.

    Args:
        questions: texts, answers and image ids, one each a question.
        images: image id -> path of its PNG.
    """
    folder = out / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    kept = set(sorted(images)[:limit])
    for number in sorted(kept):
        shutil.copyfile(images[number], folder / f"{number}.png")
    entries = [
        {
            "id": f"{split}-{image}-{index}",
            "image": f"images/{split}/{image}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for index, (question, answer, image) in enumerate(zip(*questions, strict=True))
        if image in kept
    ]
    (out / f"{split}.json").write_text(json.dumps(entries, indent=0) + "\n", encoding="utf-8")
    return len(entries)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write")
    parser.add_argument(
        "--max-images", metavar="N", type=int, help="only the first N of each split"
    )
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
        count = write_split(args.out, split, questions, images, args.max_images)
        print(f"{args.out / split}.json: {count} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
