"""ShareGPT-style JSON with images and folders of video frames to WebDataset shards for energon.

    python convert_custom_dataset_to_wds_chatml.py --dataset-root DIR [--json dataset.json]
        [--images-key images] [--videos-key videos] [--vision-root DIR] [--output-root DIR]
        [--max-samples-per-tar 10000] [--train-split 9] [--val-split 1] [--test-split 0]
        [options of prepare]

Writes DIR/wds, or the directory that --output-root names. The frames of a video `a/b.mp4` lie in
the folder `a/b`, in the order of their names; `a/b.json` may hold {"fps": 2.0}. A shim over
`megatron-vl prepare DIR/JSON DIR/wds --format chatml`; `megatron-vl prepare --help` lists its
options. Shards hold the media's own bytes, and no pickle.
"""

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dataset-root", required=True, type=Path)
    parser.add_argument("--output-root", type=Path)
    parser.add_argument("--vision-root", type=Path)
    parser.add_argument("--json", default="dataset.json")
    parser.add_argument("--images-key", default="images")
    parser.add_argument("--videos-key", default="videos")
    parser.add_argument("--max-samples-per-tar", type=float, default=10_000)
    for split, share in (("train", "9"), ("val", "1"), ("test", "0")):
        parser.add_argument(f"--{split}-split", default=share)
    parser.add_argument("--shuffle-tars", action="store_true", help="shards are shuffled anyway")
    args, options = parser.parse_known_args()
    root = args.dataset_root
    command = [
        sys.executable, "-m", "megatron_vl", "prepare", str(root / args.json),
        str(args.output_root or root / "wds"), "--format", "chatml",
        "--columns", f"images={args.images_key},videos={args.videos_key}",
        "--split", f"{args.train_split},{args.val_split},{args.test_split}",
        "--samples-per-shard", str(int(args.max_samples_per_tar)),
    ]  # fmt: skip
    if args.vision_root is not None:
        command += ["--media-root", str(args.vision_root)]
    repository = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    path = repository if not path else f"{repository}{os.pathsep}{path}"
    os.execve(sys.executable, [*command, *options], {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    main()
