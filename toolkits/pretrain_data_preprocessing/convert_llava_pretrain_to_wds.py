"""LLaVA-style JSON and images to WebDataset shards ready for energon.

    python convert_llava_pretrain_to_wds.py LLAVA_DIR [--output DIR] [options of prepare]

Writes LLAVA_DIR/wds unless --output says otherwise. A shim over
`megatron-vl prepare LLAVA_DIR DIR --format llava`; `--help` lists its options.
"""

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("--output", type=Path)
    args, options = parser.parse_known_args()
    command = [sys.executable, "-m", "megatron_vl", "prepare"]
    if args.source is None:
        print(__doc__, file=sys.stderr)
        asked = {"-h", "--help"} & set(options)
        if not asked:
            sys.exit(2)
        command += ["--help"]
    else:
        home = args.source if args.source.is_dir() else args.source.parent
        output = args.output or home / "wds"
        command += [str(args.source), str(output), "--format", "llava", *options]
    repository = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    path = repository if not path else f"{repository}{os.pathsep}{path}"
    sys.stderr.flush()
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    main()
