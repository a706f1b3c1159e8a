"""What this machine is: python card.py RESULT.json [--device cuda]"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch
from results import Results

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "megatron-core", "megatron-energon",
            "transformer-engine", "flash-attn", "flash-attn-3", "flash-attn-4", "apex",
            "liger-kernel", "torchvision", "numpy")


def said(*command: str) -> str | None:
    """What a command prints; None where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    results = Results(args.result)

    def row(what: str, value: object) -> None:
        results.row("Machine", what=what, value=str(value))

    row("date", said("date", "-u", "+%Y-%m-%d %H:%M UTC"))
    row("commit", said("git", "log", "-1", "--format=%h %cs") or "no git here")
    row("Python", platform.python_version())
    row("processor cores", len(os.sched_getaffinity(0)))
    row("memory GiB", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f}")
    for package in PACKAGES:
        row(package, version(package))
    if args.device != "cuda":
        row("device", "cpu")
        results.fact(device="cpu", memory_gib=0.0)
        return
    card = torch.cuda.get_device_properties(0)
    row("device", card.name)
    row("compute capability", f"{card.major}.{card.minor}")
    row("device memory GiB", f"{card.total_memory / 2**30:.1f}")
    row("multiprocessors", card.multi_processor_count)
    row("CUDA or HIP of torch", torch.version.cuda or torch.version.hip)
    row("cuDNN", torch.backends.cudnn.version())
    row("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    row("driver", said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"))
    from megatron_vl.platform.peaks import peak_tflops

    results.fact(device=card.name, memory_gib=card.total_memory / 2**30,
                 sheet_tflops=peak_tflops(card.name))


if __name__ == "__main__":
    main()
