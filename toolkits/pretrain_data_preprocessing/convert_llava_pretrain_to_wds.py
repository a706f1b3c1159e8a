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
    first, *words = sys.argv[1:] or [""]
    command = [sys.executable, "-m", "megatron_vl", "prepare"]
    if first in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        command += ["--help"]
    elif not first or first.startswith("-"):
        # A word behind an option of prepare may be its value: only the first is surely LLAVA_DIR.
        print(f"{__doc__}\nGive LLAVA_DIR first, before any option.", file=sys.stderr)
        sys.exit(2)
    else:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--output", type=Path)
        args, options = parser.parse_known_args(words)
        source = Path(first)
        home = source if source.is_dir() else source.parent
        output = args.output or home / "wds"
        command += [str(source), str(output), "--format", "llava", *options]
    repository = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    path = repository if not path else f"{repository}{os.pathsep}{path}"
    sys.stderr.flush()
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    main()
