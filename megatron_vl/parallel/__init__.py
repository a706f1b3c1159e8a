"""Pure arithmetic of parallel layouts; no torch, no process group."""

from megatron_vl.parallel.layout import Coordinates, Layout, Shard
from megatron_vl.parallel.schedule import in_flight, operations
from megatron_vl.parallel.stages import LANGUAGE, VISION, StageSplit

__all__ = ["LANGUAGE", "VISION", "Coordinates", "Layout", "Shard", "StageSplit", "in_flight",
           "operations"]
