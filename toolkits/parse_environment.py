"""One number about the nodes of this run, for shell scripts.

    python parse_environment.py nnodes|master_addr|master_port|nproc_per_node|node_rank

A shim over `megatron-vl cluster-env FIELD`; without FIELD it prints all.
"""

import os
import sys
from pathlib import Path


def main() -> None:
    repository = str(Path(__file__).resolve().parents[1])
    path = os.environ.get("PYTHONPATH")
    path = repository if not path else f"{repository}{os.pathsep}{path}"
    command = [sys.executable, "-m", "megatron_vl", "cluster-env", *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    main()
