"""How many processes a node has when nobody says."""

from __future__ import annotations

import os
import sys

# What drivers of GPUs make: NVIDIA's, those of its boards and of Windows' Linux, and AMD's.
DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")


def devices() -> int:
    """One a GPU, or one.

    torch takes seconds to import, and is asked only where there may be a GPU.
    """
    if sys.platform == "linux" and not any(map(os.path.exists, DRIVERS)):
        return 1
    from megatron_vl.platform import select_platform

    return select_platform().device_count() or 1
