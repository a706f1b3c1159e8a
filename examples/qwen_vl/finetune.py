#!/usr/bin/env python3
r"""Fine-tune Qwen-VL by the flags of its own finetune.py.

    torchrun $DISTRIBUTED_ARGS finetune.py --model_name_or_path DIR --data_path FILE \
        --output_dir DIR ..

A shim over `megatron-vl finetune`, which starts the ranks itself: of the processes that torchrun
starts on a node one goes on, with as many ranks. Behind -- follow options of `megatron-vl train`.
"""

import os
import sys
from pathlib import Path


def main() -> None:
    command = [sys.executable, "-m", "megatron_vl", "finetune", "--data-format", "qwen_vl"]
    repository = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    path = repository if not path else f"{repository}{os.pathsep}{path}"
    os.execve(sys.executable, [*command, *sys.argv[1:]], {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    main()
