"""Pure arithmetic of parallel layouts; no torch, no process group."""

from megatron_vl.parallel.groups import communicators
from megatron_vl.parallel.layout import Coordinates, Layout, Shard
from megatron_vl.parallel.schedule import Operation, in_flight, operations, warm_up
from megatron_vl.parallel.stages import LANGUAGE, VISION, StageSplit

__all__ = ["LANGUAGE", "VISION", "Coordinates", "Layout", "Operation", "Shard", "StageSplit",
           "communicators", "in_flight", "operations", "warm_up"]
