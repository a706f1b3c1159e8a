"""What makes Megatron-Core run on this machine; the only room that knows which machine it is."""

from megatron_vl.platform.base import Platform, select_platform, use_cpu
from megatron_vl.platform.init import (
    barrier,
    be_deterministic,
    connect,
    current_device,
    device_random_state,
    initialize,
    leave_layout,
    set_device_random_state,
)

__all__ = [
    "Platform", "barrier", "be_deterministic", "connect", "current_device", "device_random_state",
    "initialize", "leave_layout", "select_platform", "set_device_random_state", "use_cpu",
]
