"""What makes Megatron-Core run on this machine; the only room that knows which machine it is."""

from megatron_vl.platform.base import Platform, select_platform
from megatron_vl.platform.init import initialize, leave_layout

__all__ = ["Platform", "initialize", "leave_layout", "select_platform"]
