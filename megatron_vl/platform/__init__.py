"""What makes Megatron-Core run on this machine; the only room that knows which machine it is."""

from megatron_vl.platform.base import Platform, select_platform
from megatron_vl.platform.init import (
    barrier,
    be_deterministic,
    connect,
    initialize,
    leave_layout,
)

__all__ = [
    "Platform", "barrier", "be_deterministic", "connect", "initialize", "leave_layout",
    "select_platform",
]
