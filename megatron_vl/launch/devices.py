"""The devices of this node: their drivers, how many they are, what their ranks are given."""

from __future__ import annotations

import os
import sys

from megatron_vl.errors import InputError
from megatron_vl.launch import ascend

# Rows differ in their images: without it, memory is cut up by the sizes of those gone by.
_GPU = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
# What drivers make -> variables of ranks where a user sets none: NVIDIA's driver, those of its
# boards and of Windows' Linux, AMD's, and Ascend's.
DRIVERS = {"/dev/nvidiactl": _GPU, "/dev/nvmap": _GPU, "/dev/dxg": _GPU, "/dev/kfd": _GPU,
           ascend.DRIVER: ascend.VARIABLES}


def device_count() -> int:
    """Devices that this process may use; 0 where ranks share the CPU.

    Raises:
        InputError: a maker's package is installed and gives no device, or not those asked for.
    """
    ascend.check_visible(os.environ)
    try:
        from megatron_vl.platform import select_platform

        return select_platform().device_count()
    except (ImportError, RuntimeError, InputError) as error:
        why = ascend.why_not_imported(error, os.environ)
        if why is None and isinstance(error, InputError) and ascend.is_wanted(os.environ):
            why = ascend.why_no_device(os.environ)
        if why is None:
            raise
        raise InputError(why) from error


def devices() -> int:
    """One a device, or one.

    torch takes seconds to import, and is asked only where there may be a device.
    """
    if sys.platform == "linux" and not any(map(os.path.exists, DRIVERS)):
        return 1
    return device_count() or 1


def check_devices() -> list[str]:
    """Whether a run can start on this node's devices; returns what is only worth a line.

    Raises:
        InputError: a package for devices is installed, and something that it needs is missing.
    """
    ascend.check_visible(os.environ)
    if ascend.is_wanted(os.environ):
        device_count()
    return ascend.check_start(os.environ)


def variables() -> dict[str, str]:
    """Those of ranks on this node's devices that are not set; of two names for one, none where
    either is."""
    found: dict[str, str] = {}
    for path, usual in DRIVERS.items():
        if os.path.exists(path):
            found |= usual
    if "PYTORCH_ALLOC_CONF" in os.environ:
        found = {name: value for name, value in found.items() if not name.endswith("ALLOC_CONF")}
    return {name: value for name, value in found.items() if name not in os.environ}
