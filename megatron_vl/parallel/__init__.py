"""Pure arithmetic of parallel layouts, and of nodes; no torch, no process group."""

from megatron_vl.parallel.cluster import ClusterEnv, cluster_env
from megatron_vl.parallel.layout import Coordinates, Layout
from megatron_vl.parallel.stages import StageSplit

__all__ = ["ClusterEnv", "Coordinates", "Layout", "StageSplit", "cluster_env"]
