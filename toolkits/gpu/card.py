"""What this machine is: python card.py RESULT.json [--device cuda]"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from device import platform_of
from results import Results

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torch_npu", "triton", "transformers", "megatron-core", "megatron-energon",
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
    if args.device == "cpu":
        row("device", "cpu")
        results.fact(device="cpu", memory_gib=0.0)
        return
    here = platform_of(args.device)
    name, device = here.device_name(), here.device(0)
    memory = torch.get_device_module(device).mem_get_info()[1] / 2**30
    row("device", name)
    row("device memory GiB", f"{memory:.1f}")
    for what, value in {"cuda": cuda_rows, "npu": npu_rows}[here.name]():
        row(what, value)
    from megatron_vl.platform.peaks import peak_tflops

    results.fact(device=name, memory_gib=memory, sheet_tflops=peak_tflops(name))


def cuda_rows() -> Iterator[tuple[str, object]]:
    card = torch.cuda.get_device_properties(0)
    yield "compute capability", f"{card.major}.{card.minor}"
    yield "multiprocessors", card.multi_processor_count
    yield "CUDA or HIP of torch", torch.version.cuda or torch.version.hip
    yield "cuDNN", torch.backends.cudnn.version()
    yield "NCCL", ".".join(map(str, torch.cuda.nccl.version()))
    yield "driver", said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def npu_rows() -> Iterator[tuple[str, object]]:
    from megatron_vl.launch.ascend import cann_version, passed_on

    variables = passed_on(os.environ)
    home = variables.get("ASCEND_TOOLKIT_HOME") or variables.get("ASCEND_HOME_PATH")
    yield "CANN", (home and cann_version(home)) or "not known"
    yield "driver", said("cat", "/usr/local/Ascend/driver/version.info") or "not known"
    yield "variables", " ".join(f"{name}={value}" for name, value in sorted(variables.items())
                                if "PATH" not in name)


if __name__ == "__main__":
    main()
