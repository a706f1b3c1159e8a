"""Our launcher in the place of torchrun, for a command that does more than to train."""

from __future__ import annotations

from collections.abc import MutableMapping

from megatron_vl.launch.cluster import cluster_env

OWN = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PREFIXES = ("GROUP_", "ROLE_", "TORCHELASTIC_")


def take_over(environ: MutableMapping[str, str]) -> list[str] | None:
    """Flags that let our launcher start the ranks that torchrun started; None in all processes of
    a node but the first, which have nothing to do.

    `environ` loses what torchrun set. Our ranks meet one port above torchrun's own, which it holds.

    Raises:
        InputError: variables that contradict one another.
    """
    first = environ["LOCAL_RANK"] == "0"
    env = cluster_env(environ)
    for name in [name for name in environ if name in OWN or name.startswith(PREFIXES)]:
        del environ[name]
    if not first:
        return None
    return ["--nnodes", str(env.nnodes), "--node-rank", str(env.node_rank),
            "--nproc-per-node", str(env.nproc_per_node), "--master-addr", env.master_addr,
            "--master-port", str(env.master_port + 1), "--no-cluster-env"]
