"""Start this node's ranks with torchrun's launcher; give back the first failure's exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path

from megatron_vl.cli.worker import FAILURE_FILE, read_failure
from megatron_vl.errors import InputError


def launch(
    argv: list[str],
    *,
    nproc_per_node: int,
    nnodes: int = 1,
    node_rank: int = 0,
    master_addr: str = "127.0.0.1",
    master_port: int = 29500,
) -> int:
    """Run `megatron-vl ARGV` as `nproc_per_node` ranks; returns the job's exit code.

    A signal ends the ranks, and gives 128 + its number as a shell would.

    Raises:
        InputError: the nodes did not meet at `master_addr`:`master_port`.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The rank that failed has said why; the launcher's own report would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc_per_node))
    )
    # Megatron-Core counts on it to overlap tensor-parallel messages with matrix products.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    one_node = nnodes == 1
    with tempfile.TemporaryDirectory(prefix="megatron-vl-") as scratch:
        failure = Path(scratch) / "failure"
        os.environ[FAILURE_FILE] = str(failure)
        config = LaunchConfig(
            min_nodes=nnodes,
            max_nodes=nnodes,
            nproc_per_node=nproc_per_node,
            run_id=uuid.uuid4().hex if one_node else "megatron-vl",
            # One node picks a free port; several meet where they were told to.
            rdzv_backend="c10d" if one_node else "static",
            rdzv_endpoint="localhost:0" if one_node else f"{master_addr}:{master_port}",
            rdzv_configs={} if one_node else {"rank": node_rank, "timeout": 900},
            max_restarts=0,
            monitor_interval=0.1,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "megatron_vl", *argv)
        except ChildFailedError as error:
            code, report = read_failure(failure) or (1, _no_report(argv[0], error))
            print(report, end="", file=sys.stderr, flush=True)
            return code
        except SignalException as error:
            # Whatever the ranks reported, they were told to stop.
            name = signal.Signals(error.sigval).name
            print(f"megatron-vl {argv[0]}: ended by {name}", file=sys.stderr, flush=True)
            return 128 + error.sigval
        except (RendezvousError, DistError) as error:
            raise InputError(_no_meeting(one_node, node_rank, master_addr, master_port)) from error
        finally:
            del os.environ[FAILURE_FILE]
    return 0


def _no_report(command: str, error) -> str:
    rank, first = error.get_first_failure()
    return f"megatron-vl {command}: rank {rank} {_ending(first.exitcode)}\n"


def _no_meeting(one_node: bool, node_rank: int, address: str, port: int) -> str:
    if one_node:
        return "this node's processes found no free port of localhost to meet at; free one."
    return (
        f"node {node_rank} could not meet the others at {address}:{port}; give every node node 0's "
        f"address as --master-addr, a port that is free there and open to the others as "
        f"--master-port, and a --node-rank of its own."
    )


def _ending(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with code {exitcode} and no message."
    name = signal.Signals(-exitcode).name
    hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}."
