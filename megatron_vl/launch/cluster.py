"""Which node of how many this is, from a scheduler's environment variables or a hostfile.

`ROWS` is the table: one entry a scheduler, the first whose variables are set is taken. A number
that two variables tell differently, be they of one row or of two, is refused, never chosen from. So
are variables that tell of several nodes where no row applies. An empty variable counts as not set.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_vl.errors import Bounds, InputError, shown
from megatron_vl.launch.hostfile import Host, expand_nodelist
from megatron_vl.launch.node_counts import check_alone, check_counts, check_node, check_whole
from megatron_vl.launch.variables import (
    MOST_NODES,
    MOST_PROCESSES,
    Variables,
    contradiction,
)

PORT = 29500  # where node 0 is met when nobody says otherwise, as torchrun has it
MACHINE = "this machine"  # the source when no row applies
HOSTFILE = "hostfile"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterEnv:
    """Where this node stands among those of one run.

    Raises:
        InputError: no such node, or no such port.
    """

    nnodes: int = 1
    node_rank: int = 0  # this node's number, from 0
    nproc_per_node: int | None = None  # None: nobody said; the launcher looks at the machine
    master_addr: str = "127.0.0.1"  # node 0's, as the others can reach it
    master_port: int = PORT
    source: str = MACHINE  # the row of the table that gave it

    def __post_init__(self) -> None:
        processes = 1 if self.nproc_per_node is None else self.nproc_per_node
        Bounds(least=1, most=MOST_NODES).check("the number of nodes (nnodes)", self.nnodes)
        Bounds(least=1, most=MOST_PROCESSES).check(
            "the number of a node's processes (nproc-per-node)", processes
        )
        if not 0 <= self.node_rank < self.nnodes:
            raise InputError(
                f"node-rank {self.node_rank} is not one of the {self.nnodes} node(s); number them "
                f"from 0 to {self.nnodes - 1}."
            )
        if not 0 < self.master_port < 2**16:
            raise InputError(f"master-port is {self.master_port}; give one from 1 to 65535.")


def cluster_env(environ: Mapping[str, str]) -> ClusterEnv:
    """What the first row of `ROWS` that applies makes of `environ`; without one, a single machine.

    Raises:
        InputError: a variable that is missing, is no number, or contradicts another; or one that
            tells of other nodes, and no row that does.
    """
    variables = Variables(environ)
    row = next((row for row in ROWS if row.applies(variables)), None)
    if row is not None and row.started_us:
        env = row.read(variables, row.source)
        check_whole(variables, row.source, env.nnodes)
        return env
    if row is not None:
        check_counts(variables, row.count)
        env = row.read(variables, row.source)
        check_node(variables, row.source, env.nnodes, env.node_rank)
        return env
    check_alone(variables)
    return ClusterEnv(
        nproc_per_node=variables.processes(), master_port=variables.port("MASTER_PORT") or PORT
    )


def check_started(environ: Mapping[str, str]) -> None:
    """Raises InputError: torchrun started ranks on this node alone, in a job of several."""
    variables = Variables(environ)
    here = variables.text("LOCAL_WORLD_SIZE")  # which other launchers may not set
    if here is not None and here == variables.text("WORLD_SIZE"):
        check_whole(variables, "torchrun", 1)


def check_one_launcher(environ: Mapping[str, str], env: ClusterEnv) -> None:
    """Raises InputError when the scheduler starts several of us on a node, or not all nodes'.

    Every node's ranks are started by one process, which torchrun calls the agent.
    """
    variables = Variables(environ)
    if env.source == "Open MPI":
        tasks = variables.number("OMPI_COMM_WORLD_LOCAL_SIZE", 1) or 1
        if tasks > 1:
            raise InputError(
                f"mpirun started {tasks} processes on this node (OMPI_COMM_WORLD_LOCAL_SIZE); "
                f"start one a node with --map-by ppr:1:node, it starts the ranks itself."
            )
    if env.source == "Slurm":
        tasks_per_node = variables.text("SLURM_STEP_TASKS_PER_NODE") or "1"
        if any(re.sub(r"\(x\d+\)$", "", part) != "1" for part in tasks_per_node.split(",")):
            raise InputError(
                f"srun started several tasks a node (SLURM_STEP_TASKS_PER_NODE is "
                f"{shown(tasks_per_node)}); start one with --ntasks-per-node=1, it starts the "
                f"ranks itself."
            )
        if env.nnodes > 1 and variables.text("SLURM_STEP_ID") is None:
            raise InputError(
                f"this is the batch script of a Slurm job of {env.nnodes} nodes and would wait for "
                f"the others in vain; start the command on all of them with srun."
            )


# ---- the rows ---------------------------------------------------------------------------------


def _torchrun(v: Variables, source: str) -> ClusterEnv:
    world = v.need("WORLD_SIZE", source, lambda name: v.number(name, 1))
    local = v.need("LOCAL_WORLD_SIZE", source, lambda name: v.number(name, 1))
    rank, local_rank = v.number("RANK"), v.number("LOCAL_RANK")
    if world % local:
        contradiction("WORLD_SIZE", world, "LOCAL_WORLD_SIZE", local)
    if rank >= world:
        contradiction("RANK", rank, "WORLD_SIZE", world)
    if rank % local != local_rank:
        contradiction("RANK", rank, f"LOCAL_RANK of {local}", local_rank)
    return ClusterEnv(
        nnodes=world // local, node_rank=rank // local, nproc_per_node=local,
        master_addr=v.address(None, world // local, source),
        master_port=v.port("MASTER_PORT") or PORT, source=source,
    )


def _kubeflow(v: Variables, source: str) -> ClusterEnv:
    processes = v.text("PET_NPROC_PER_NODE")
    # auto, gpu and cpu are torchrun's words for: look at the machine.
    counted = None if processes in ("auto", "gpu", "cpu") else v.number("PET_NPROC_PER_NODE", 1)
    own = v.number("NPROC_PER_NODE", 1)
    if None not in (counted, own) and counted != own:
        contradiction("PET_NPROC_PER_NODE", counted, "NPROC_PER_NODE", own)
    nnodes = _kubeflow_nodes(v, counted, source)
    names = [name for name in ("PET_NODE_RANK", "RANK") if v.text(name)] or ["PET_NODE_RANK"]
    ranks = [v.rank(name, "PET_NNODES", nnodes, source) for name in names]
    if len(set(ranks)) > 1:
        contradiction(names[0], ranks[0], names[1], ranks[1])
    address = v.same(v.text, "PET_MASTER_ADDR", "MASTER_ADDR")
    return ClusterEnv(
        nnodes=nnodes, node_rank=ranks[0], nproc_per_node=counted or own,
        master_addr=v.address(address, nnodes, source),
        master_port=v.same(v.port, "PET_MASTER_PORT", "MASTER_PORT") or PORT, source=source,
    )


def _kubeflow_nodes(v: Variables, processes: int | None, source: str) -> int:
    """PET_NNODES; of a range the number that WORLD_SIZE, in nodes or in processes, leaves."""
    text = v.need("PET_NNODES", source, v.text)
    found = re.fullmatch(r"(\d{1,18})(?::(\d{1,18}))?", text, re.ASCII)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise InputError(
            f"PET_NNODES is {shown(repr(text))}; it must be a number of nodes as 2, or as 1:3."
        )
    world = v.number("WORLD_SIZE", 1)
    if world is None:
        if least < most:
            raise InputError(
                f"PET_NNODES is {text}, but a run has a fixed number of nodes; remove the job's "
                f"elasticPolicy, or give --nnodes and --node-rank."
            )
        return least
    # Older operators count replicas, newer ones replicas x processes.
    if least == most and processes is None and world % least == 0:
        return least
    counts = {world} | ({world // processes} if processes and world % processes == 0 else set())
    fits = [count for count in counts if least <= count <= most]
    if not fits:
        contradiction("PET_NNODES", text, "WORLD_SIZE", world)
    if len(fits) > 1:
        raise InputError(
            f"PET_NNODES is {text} and WORLD_SIZE {world}, which may be {fits[0]} nodes or "
            f"{fits[1]}; remove the job's elasticPolicy, or give --nnodes and --node-rank."
        )
    return fits[0]


def _volcengine(v: Variables, source: str) -> ClusterEnv:
    nnodes = v.number("MLP_WORKER_NUM", 1)
    return ClusterEnv(
        nnodes=nnodes, node_rank=v.rank("MLP_ROLE_INDEX", "MLP_WORKER_NUM", nnodes, source),
        nproc_per_node=v.processes("MLP_WORKER_GPU"),
        master_addr=v.address(v.same(v.text, "MLP_WORKER_0_HOST", "MASTER_ADDR"), nnodes, source),
        master_port=v.same(v.port, "MLP_WORKER_0_PORT", "MASTER_PORT") or PORT, source=source,
    )


def _afo(v: Variables, source: str) -> ClusterEnv:
    name = "AFO_ENV_CLUSTER_SPEC"
    from megatron_vl.inputs import json_value  # and PyYAML, for which the other rows do not wait

    try:
        spec = json_value(v.text(name))
        hosts, index = spec[spec["role"]], spec["index"]
        # A host may have several ports, as in host:1,2.
        address, _, ports = hosts[0].rpartition(":")
        port, index = int(ports.split(",")[0]), int(str(index))
        if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
            raise TypeError("hosts are a list of texts")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(
            f'{name} is {shown(repr(v.text(name)))}; it must be like {{"role": "worker", '
            f'"index": 0, "worker": ["host:port"]}}.'
        ) from error
    if not 0 <= index < len(hosts):
        contradiction(f"index of {name}", index, f"the number of hosts in {name}", len(hosts))
    for own, theirs in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        given = v.text(own) if own == "MASTER_ADDR" else v.port(own)
        if given not in (None, theirs):
            contradiction(own, given, f"that of {name}", theirs)
    return ClusterEnv(
        nnodes=len(hosts), node_rank=index, nproc_per_node=v.processes(), master_addr=address,
        master_port=port, source=source,
    )


def _modelarts(v: Variables, source: str) -> ClusterEnv:
    nnodes = v.same(lambda name: v.number(name, 1), "MA_NUM_HOSTS", "VC_WORKER_NUM")
    hosts = _host_list(v, "VC_WORKER_HOSTS")
    if hosts and len(hosts) != nnodes:
        contradiction("MA_NUM_HOSTS", nnodes, "the number of VC_WORKER_HOSTS", len(hosts))
    return ClusterEnv(
        nnodes=nnodes, node_rank=v.rank("VC_TASK_INDEX", "MA_NUM_HOSTS", nnodes, source),
        nproc_per_node=v.processes("MA_NUM_GPUS"),
        master_addr=v.address(hosts[0] if hosts else None, nnodes, source),
        master_port=v.port("MASTER_PORT") or PORT, source=source,
    )


def _volcano_tasks(v: Variables) -> list[str]:
    """Names of the tasks that have hosts; MASTER, which holds node 0, first."""
    names = [found[1] for name in v.environ if (found := re.fullmatch(r"VC_(\w+)_HOSTS", name))]
    return sorted((n for n in names if v.text(f"VC_{n}_HOSTS")), key=lambda n: (n != "MASTER", n))


def _volcano(v: Variables, source: str) -> ClusterEnv:
    tasks = _volcano_tasks(v)
    hosts = []
    for task in tasks:
        own = _host_list(v, f"VC_{task}_HOSTS")
        count = v.number(f"VC_{task}_NUM")
        if count not in (None, len(own)):
            contradiction(f"VC_{task}_NUM", count, f"the number of VC_{task}_HOSTS", len(own))
        hosts.append(own)
    index = v.same(v.number, "VC_TASK_INDEX", "VK_TASK_INDEX")
    mine = 0
    if len(tasks) > 1:  # the index counts within a task, and only the host's name tells which
        name = (v.text("HOSTNAME") or "").split(".")[0]
        mine = next(
            (k for k, own in enumerate(hosts) if name in [host.split(".")[0] for host in own]), None
        )
        if mine is None:
            raise InputError(
                f"HOSTNAME is {shown(repr(name))}, which is in none of "
                f"{shown(', '.join(f'VC_{task}_HOSTS' for task in tasks))}; "
                f"give --nnodes, --node-rank, --master-addr and --master-port."
            )
    nnodes = sum(map(len, hosts))
    if index is None and nnodes > 1:
        v.need("VC_TASK_INDEX", source, v.number)
    if (index or 0) >= len(hosts[mine]):
        contradiction(
            "VC_TASK_INDEX", index, f"the number of VC_{tasks[mine]}_HOSTS", len(hosts[mine])
        )
    return ClusterEnv(
        nnodes=nnodes, node_rank=sum(map(len, hosts[:mine])) + (index or 0),
        nproc_per_node=v.processes(), master_addr=v.address(hosts[0][0], nnodes, source),
        master_port=v.port("MASTER_PORT") or PORT, source=source,
    )


def _host_list(v: Variables, name: str) -> list[str]:
    return [host.strip() for host in (v.text(name) or "").split(",") if host.strip()]


def _plain(v: Variables, source: str) -> ClusterEnv:
    nnodes = v.number("NNODES", 1)
    return ClusterEnv(
        nnodes=nnodes, node_rank=v.rank("NODE_RANK", "NNODES", nnodes, source),
        nproc_per_node=v.processes(), master_addr=v.address(None, nnodes, source),
        master_port=v.port("MASTER_PORT") or PORT, source=source,
    )


def _dlc(v: Variables, source: str) -> ClusterEnv:
    nnodes = v.number("WORLD_SIZE", 1)
    return ClusterEnv(
        nnodes=nnodes, node_rank=v.rank("RANK", "WORLD_SIZE", nnodes, source),
        nproc_per_node=v.processes("KUBERNETES_CONTAINER_RESOURCE_GPU"),
        master_addr=v.address(None, nnodes, source),
        master_port=v.port("MASTER_PORT") or PORT, source=source,
    )


def _mpi(v: Variables, source: str) -> ClusterEnv:
    size = v.number("OMPI_COMM_WORLD_SIZE", 1)
    local = v.number("OMPI_COMM_WORLD_LOCAL_SIZE", 1) or 1
    rank = v.rank("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", size, source)
    if size % local:
        contradiction("OMPI_COMM_WORLD_SIZE", size, "OMPI_COMM_WORLD_LOCAL_SIZE", local)
    local_rank = v.number("OMPI_COMM_WORLD_LOCAL_RANK")
    if local_rank not in (None, rank % local):
        contradiction(
            "OMPI_COMM_WORLD_RANK", rank, f"OMPI_COMM_WORLD_LOCAL_RANK of {local}", local_rank
        )
    return ClusterEnv(
        nnodes=size // local, node_rank=rank // local,
        nproc_per_node=v.processes() or (local if local > 1 else None),
        master_addr=v.address(None, size // local, source),
        master_port=v.port("MASTER_PORT") or PORT, source=source,
    )


def _slurm(v: Variables, source: str) -> ClusterEnv:
    # A step of srun may hold fewer nodes than its job.
    step = v.text("SLURM_STEP_NODELIST") is not None
    list_name = "SLURM_STEP_NODELIST" if step else "SLURM_JOB_NODELIST"
    number = "SLURM_STEP_NUM_NODES" if step else "SLURM_NNODES"
    hosts = expand_nodelist(v.need(list_name, source, v.text), list_name)
    nnodes = v.number(number, 1) or len(hosts)
    if nnodes != len(hosts):
        contradiction(number, nnodes, f"the number of hosts in {list_name}", len(hosts))
    # A port of its own for each job, below those the kernel gives to clients.
    job = v.number("SLURM_JOB_ID")
    return ClusterEnv(
        nnodes=nnodes, node_rank=v.rank("SLURM_NODEID", number, nnodes, source),
        nproc_per_node=v.processes("SLURM_GPUS_ON_NODE"),
        master_addr=v.address(hosts[0], nnodes, source),
        master_port=v.port("MASTER_PORT") or 10000 + job % 20000, source=source,
    )


class Scheduler(NamedTuple):
    """One scheduler."""

    source: str  # its name
    signs: tuple[str, ...]  # variables that must be set for it to apply
    read: Callable[[Variables, str], ClusterEnv]
    count: str | None = None  # a variable that counts nodes in this row and processes in others
    started_us: bool = False  # so that what others say was inherited

    def applies(self, variables: Variables) -> bool:
        if self.source == "Volcano":
            return bool(_volcano_tasks(variables))
        return all(variables.text(sign) is not None for sign in self.signs)


# The order is the precedence: who started this process itself, then schedulers by the names only
# they use, then the plain names, then those that a job of another kind may have inherited.
ROWS = (
    Scheduler("torchrun", ("LOCAL_RANK", "RANK", "WORLD_SIZE"), _torchrun, started_us=True),
    Scheduler("PyTorchJob", ("PET_NNODES", "WORLD_SIZE"), _kubeflow),
    Scheduler("TrainJob", ("PET_NNODES",), _kubeflow),
    Scheduler("Volcengine", ("MLP_WORKER_NUM",), _volcengine),
    Scheduler("Meituan AFO", ("AFO_ENV_CLUSTER_SPEC",), _afo),
    Scheduler("ModelArts", ("MA_NUM_HOSTS",), _modelarts),
    Scheduler("Volcano", ("VC_TASK_HOSTS",), _volcano),
    Scheduler("NNODES and NODE_RANK", ("NNODES", "NODE_RANK"), _plain),
    Scheduler("PAI-DLC", ("WORLD_SIZE",), _dlc, count="WORLD_SIZE"),
    Scheduler("Open MPI", ("OMPI_COMM_WORLD_SIZE",), _mpi),
    Scheduler("Slurm", ("SLURM_JOB_ID", "SLURM_NODEID"), _slurm),
)


# ---- a hostfile ------------------------------------------------------------------------------


def hostfile_env(
    hosts: Sequence[Host], environ: Mapping[str, str], own: Collection[str]
) -> ClusterEnv:
    """This node among `hosts`: number NODE_RANK, else the line that is one of our `own` names.

    Raises:
        InputError: no line, or several, are this machine.
    """
    variables = Variables(environ)
    rank = variables.number("NODE_RANK")
    if rank is None:
        mine = [number for number, host in enumerate(hosts) if host.address in own]
        if len(mine) != 1:
            raise InputError(
                f"{len(mine)} of the {len(hosts)} hosts of the hostfile are this machine "
                f"({', '.join(sorted(own))}); set NODE_RANK to its line's number, from 0."
            )
        (rank,) = mine
    elif rank >= len(hosts):
        contradiction("NODE_RANK", rank, "the number of hosts in the hostfile", len(hosts))
    return ClusterEnv(
        nnodes=len(hosts), node_rank=rank,
        nproc_per_node=variables.processes() or hosts[0].slots,
        master_addr=variables.address(hosts[0].address, len(hosts), HOSTFILE),
        master_port=variables.port("MASTER_PORT") or PORT, source=HOSTFILE,
    )
