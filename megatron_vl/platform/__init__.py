"""What makes Megatron-Core run on this machine; the only room that knows which machine it is."""

from megatron_vl.platform.base import Platform, select_platform
from megatron_vl.platform.init import initialize

__all__ = ["Platform", "initialize", "select_platform"]
