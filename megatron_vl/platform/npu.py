"""Ascend NPUs over HCCL, through torch_npu alone: neither MindSpeed nor transfer_to_npu is needed.

torch_npu makes NPUs torch's devices of another maker, with torch.npu in the place of torch.cuda.
Megatron-Core asks for CUDA and finds them: see `platform.stand_in`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys

import torch

from megatron_vl.errors import InputError
from megatron_vl.platform.checkpoints import install_common_reader
from megatron_vl.platform.offload import install_offload
from megatron_vl.platform.optimizer import install_optimizer
from megatron_vl.platform.recompute import install_recompute
from megatron_vl.platform.reductions import install_reductions
from megatron_vl.platform.router import install_router
from megatron_vl.platform.stand_in import install_stand_in
from megatron_vl.platform.write_results import install_write_results

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
_CPU_INSTEAD = f"set {VISIBLE}= to run on the CPU"
# No bf16, and no infinity in fp16: an overflow gives the largest number, which no loss scale sees.
_FIRST_GENERATION = re.compile(r"Ascend910(A|ProA|ProB|PremiumA)\b")
_installed = False


def is_here() -> bool:
    """Whether this machine trains on NPUs: torch_npu is installed, and nobody hid them.

    Raises:
        InputError: it is installed and gives no NPU, which must not become a run on the CPU
            unnoticed.
    """
    if os.environ.get(VISIBLE) == "":
        return False
    if not hasattr(torch, "npu"):  # torch loads it by itself, unless that is turned off
        if importlib.util.find_spec("torch_npu") is None:
            return False
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:
            raise InputError(
                f"torch_npu is installed and cannot be loaded ({error}); source CANN's set_env.sh "
                f"in this shell, see that torch is the build torch_npu asks for, or {_CPU_INSTEAD}."
            ) from error
    if not torch.npu.is_available():
        raise InputError(
            f"torch_npu is installed and finds no NPU; see what npu-smi info lists and what "
            f"{VISIBLE} leaves of it, or {_CPU_INSTEAD}."
        )
    return True


class NpuPlatform:
    name = "npu"
    notice = (
        "npu: this project has never run on an NPU, only on a CPU that stands for one; please "
        "report what you see, whether it works or fails (docs/ascend.md says what and where)"
    )
    collective_backend = "hccl"
    runs_cuda = False
    fuses_ops = True  # by kernels of torch_npu's
    in_host_memory = False

    def install(self) -> None:
        global _installed
        if _installed:
            return
        if "mindspeed.megatron_adaptor" in sys.modules:
            raise InputError(
                "mindspeed.megatron_adaptor has changed Megatron-Core in this process, which this "
                "project does in its own way; leave its import out (transfer_to_npu may stay)."
            )
        # Layouts of the vendor's own cannot be cut, sent or saved as torch's are; and a program
        # compiled for a shape does not pay where every row has other images.
        torch.npu.config.allow_internal_format = False
        torch.npu.set_compile_mode(jit_compile=False)
        install_stand_in(torch.device("npu"), torch.npu)
        install_optimizer(norm_dtype=torch.float32)
        install_reductions("npu")
        install_write_results()
        install_common_reader()
        install_recompute()
        install_router()
        install_offload()
        _installed = True

    def device_count(self) -> int:
        return torch.npu.device_count()

    def capability(self) -> None:
        """It has none."""

    def cudnn_version(self) -> int:
        return 0

    def device(self, local_rank: int) -> torch.device:
        count = self.device_count()
        if local_rank >= count:
            raise InputError(
                f"process {local_rank} of this node has no NPU of its own, there are {count}; "
                f"start at most {count}, or {_CPU_INSTEAD}."
            )
        device = torch.device("npu", local_rank)
        torch.npu.set_device(device)
        name = self.device_name()
        if _FIRST_GENERATION.match(name):
            raise InputError(
                f"{name} has no bf16, and in fp16 saturates where others give inf, so that no loss "
                f"scale sees an overflow; use an Atlas A2 (Ascend910B) or later, or {_CPU_INSTEAD}."
            )
        return device

    def synchronize(self) -> None:
        torch.npu.synchronize()

    def peak_memory_bytes(self) -> int:
        return torch.npu.max_memory_allocated()

    def device_name(self) -> str:
        return torch.npu.get_device_name()

    def mark(self):
        event = torch.npu.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, start, end) -> float:
        return start.elapsed_time(end) / 1000
