"""What variables say of the number of nodes, whoever set them and whichever row is taken.

A row of `cluster.ROWS` reads the variables of its scheduler. A job has those of others too, that a
shell exported or an outer scheduler left: where one of them counts other nodes, or numbers this one
otherwise, one of the two is wrong. Where no row applies, they tell that this machine is not alone.
"""

from __future__ import annotations

from megatron_vl.errors import InputError
from megatron_vl.launch.variables import Variables, contradiction

# Each line is one number: the first that is set is it.
_NODES = (
    ("NNODES",), ("PET_NNODES",), ("MLP_WORKER_NUM",), ("MA_NUM_HOSTS",),
    # A step of srun may hold fewer nodes than its job.
    ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    ("NUM_NODES",), ("PBS_NUM_NODES",), ("NHOSTS",), ("FLUX_JOB_NNODES",),  # PBS, Grid Engine, Flux
    ("AWS_BATCH_JOB_NUM_NODES",), ("AZUREML_NODE_COUNT",), ("SKYPILOT_NUM_NODES",),
    ("ARNOLD_WORKER_NUM",), ("PADDLE_TRAINERS_NUM",), ("N_NODES",),
)  # fmt: skip
# Count processes, which are as many on every node.
_PROCESSES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_NODE_RANKS = (
    "NODE_RANK", "PET_NODE_RANK", "MLP_ROLE_INDEX", "SLURM_NODEID", "AWS_BATCH_JOB_NODE_INDEX",
    "SKYPILOT_NODE_RANK", "ARNOLD_ID",
)  # fmt: skip


def check_counts(v: Variables, own: str | None) -> None:
    """Whether all that is set counts the same nodes.

    Args:
        own: a variable that the row taken counts nodes by, if it is none of `_NODES`.

    Raises:
        InputError: two do not, by name.
    """
    counts = ([(own, v.number(own, 1))] if own else []) + _counts(v)
    for name, count in counts[1:]:
        if count != counts[0][1]:
            contradiction(*counts[0], name, count)
    for name in _PROCESSES:
        processes = v.number(name, 1)
        if counts and processes is not None and processes % counts[0][1]:
            contradiction(*counts[0], name, processes)


def check_node(v: Variables, source: str, nnodes: int, node_rank: int) -> None:
    """Whether all that is set agrees with what a row has read. Raises InputError: by name."""
    for name, count in _counts(v):
        if count != nnodes:
            contradiction(f"the number of nodes as {source} tells it", nnodes, name, count)
    for name in _NODE_RANKS:
        rank = v.number(name)
        if rank not in (None, node_rank):
            contradiction(f"this node's number as {source} tells it", node_rank, name, rank)


def check_whole(v: Variables, source: str, nnodes: int) -> None:
    """Whether ranks that another launcher started on one node are all there are.

    On several it knows of others; which of a job's nodes they are is then its own affair.

    Raises:
        InputError: a variable counts more nodes; each would train alone.
    """
    for name, count in _counts(v) if nnodes == 1 else ():
        if count > 1:
            raise InputError(
                f"{name} is {count}, but {source} started its ranks on this node alone (WORLD_SIZE "
                f"is LOCAL_WORLD_SIZE), so each node would train by itself; start it with --nnodes "
                f"{count} on all of them, or give --no-cluster-env where this node alone is meant."
            )


def check_alone(v: Variables) -> None:
    """Raises InputError: no row applies, but a variable tells of other nodes."""
    counts = _counts(v) + [(name, v.number(name)) for name in _PROCESSES]
    more = [(name, count) for name, count in counts if (count or 0) > 1]
    more += [(name, rank) for name in (*_NODE_RANKS, "RANK") if (rank := v.number(name) or 0) > 0]
    if not more:
        return
    name, value = more[0]
    mend = "start the command on all of them with srun, or " if name.startswith("SLURM") else ""
    raise InputError(
        f"{name} is {value}, so there is more than one node, but nothing says how many there are "
        f"and which this is; {mend}set NNODES, NODE_RANK and MASTER_ADDR, or give --nnodes, "
        f"--node-rank and --master-addr; --no-cluster-env is for this machine alone."
    )


def _counts(v: Variables) -> list[tuple[str, int]]:
    found = []
    for names in _NODES:
        for name in names:
            if name == "PET_NNODES" and ":" in (v.text(name) or ""):
                continue  # a range, which its own row makes one number of
            if (count := v.number(name, 1)) is not None:
                found.append((name, count))
                break
    return found
