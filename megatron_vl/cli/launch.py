"""Start this node's ranks with torchrun's launcher; give back the first failure's exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path

from megatron_vl.cli.worker import FAILURE_FILE


def launch(
    argv: list[str],
    *,
    nproc_per_node: int,
    nnodes: int = 1,
    node_rank: int = 0,
    master_addr: str = "127.0.0.1",
    master_port: int = 29500,
) -> int:
    """Run `megatron-vl ARGV` as `nproc_per_node` ranks; returns the job's exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The rank that failed has said why; the launcher's own report would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc_per_node))
    )
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
            if failure.is_file():
                return int(failure.read_text())
            rank, first = error.get_first_failure()
            print(f"megatron-vl {argv[0]}: rank {rank} {_ending(first.exitcode)}", file=sys.stderr)
            return 1
    return 0


def _ending(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with code {exitcode} and no message."
    name = signal.Signals(-exitcode).name
    hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}."
