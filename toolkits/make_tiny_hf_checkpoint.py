#!/usr/bin/env python3
"""A small random model as a complete Hugging Face directory.

    python make_tiny_hf_checkpoint.py OUT [--hidden-size 128 --num-layers 4 ..]

A shim over `megatron-vl tiny`; `--help` lists its options.
"""

import os
import sys
from pathlib import Path


def main() -> None:
    command = [sys.executable, "-m", "megatron_vl", "tiny", *sys.argv[1:]]
    repository = str(Path(__file__).resolve().parents[1])
    path = os.environ.get("PYTHONPATH")
    path = repository if not path else f"{repository}{os.pathsep}{path}"
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    main()
