"""This node's ranks: started, watched, started again, and ended by one message and one code."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.launch import interrupts
from megatron_vl.launch.devices import DRIVERS, check_devices, variables
from megatron_vl.launch.interface import (
    address_towards,
    interface_of,
    name_leads_here_alone,
)
from megatron_vl.launch.meeting import agree, meet, meet_alone, no_meeting
from megatron_vl.launch.pulse import Pulse
from megatron_vl.launch.stop import AGAIN, SIGNALS
from megatron_vl.launch.worker import FAILURE_FILE, STEPPED, STOP, read_failure

CACHE = "TORCHINDUCTOR_CACHE_DIR"
IFNAME = "GLOO_SOCKET_IFNAME"


def launch(
    argv: list[str],
    *,
    nproc_per_node: int,
    nnodes: int = 1,
    node_rank: int = 0,
    master_addr: str = "127.0.0.1",
    master_port: int = 29500,
    rendezvous_timeout: float = 900.0,
    max_restarts: int = 0,
    saves: bool = False,
) -> int:
    """Run `megatron-vl ARGV` as `nproc_per_node` ranks; returns the job's exit code.

    A signal ends the ranks, and gives 128 + its number as a shell would; where the command saves,
    SIGTERM and SIGUSR1 first let it do so.

    Args:
        max_restarts: times that all ranks are started again after one of them died, or failed
            for another reason than its input. On several nodes all do so, or none: a rank that is
            gone takes those of the other nodes with it.
        saves: the command knows `STOP`.

    Raises:
        InputError: the nodes did not meet at `master_addr`:`master_port` within
            `rendezvous_timeout` seconds, or do not fit together; or see `check_devices`.
    """
    import_module("torch.distributed.launcher.api")  # before there is anything to tidy up
    interrupts.heed()
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc_per_node))
    )
    # Megatron-Core counts on it to overlap tensor-parallel messages with matrix products.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    says = check_devices()
    if given := variables():
        os.environ.update(given)
        words = " ".join(f"{name}={value}" for name, value in given.items())
        says.append(f"set for the ranks, as nothing had set it: {words}")
    for line in says:
        _say(argv[0], line)
    if nnodes == 1 and sys.platform == "linux":
        os.environ.setdefault(IFNAME, "lo")  # nobody else has to reach the ranks
    attempt, store = 0, None
    while True:
        # Kept while the ranks run: node 0's is where they all meet.
        store, nodes = (meet_alone(), []) if nnodes == 1 else meet(
            nnodes=nnodes, node_rank=node_rank, nproc_per_node=nproc_per_node,
            address=master_addr, port=master_port, timeout=rendezvous_timeout, attempt=attempt,
            store=store,
        )
        hosts = [one["host"] for one in nodes]
        if nodes:
            _listen_where_others_reach(nodes, node_rank, argv[0])
        with (
            _pulse(store, attempt, hosts, node_rank, argv[0]),
            tempfile.TemporaryDirectory(prefix="megatron-vl-") as scratch,
        ):
            end = _attempt(
                argv, Path(scratch), attempt, saves=saves, nproc_per_node=nproc_per_node,
                nnodes=nnodes, node_rank=node_rank, meeting=(store.host, store.port),
                patience=max(1, int(rendezvous_timeout)),
            )
        if end is None:
            raise InputError(no_meeting(node_rank, master_addr, master_port))
        if end.report:
            print(end.report, end="", file=sys.stderr, flush=True)
        if nnodes > 1 and max_restarts:
            end = _together(end, argv[0], store, attempt, node_rank=node_rank, hosts=hosts,
                            timeout=rendezvous_timeout)
        if not starts_again(end, attempt, max_restarts):
            return end.code
        attempt += 1
        _say(argv[0], f"starting all processes again, restart {attempt} of {max_restarts} "
                      f"(max-restarts)")


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How an attempt ended."""

    code: int
    report: str = ""
    hopeful: bool = False  # another attempt may do better
    final: bool = True  # whatever other nodes hope for


def _listen_where_others_reach(nodes: Sequence[dict], node_rank: int, command: str) -> None:
    """Name gloo an interface, if a host's own name leads nowhere.

    Args:
        nodes: see `meet`.
    """
    alone = len({one["host"] for one in nodes}) == 1  # then any address will do
    if alone or IFNAME in os.environ or not name_leads_here_alone():
        return
    address = nodes[node_rank]["address"] or address_towards(nodes[-1]["address"], 1)
    if interface := interface_of(address):
        os.environ[IFNAME] = interface
        print(f"megatron-vl {command}: the name {socket.gethostname()} is no address for other "
              f"hosts here, so ranks listen at {address} ({IFNAME} {interface})", flush=True)


def _pulse(
    store, attempt: int, hosts: Sequence[str], node_rank: int, command: str
) -> contextlib.AbstractContextManager:
    """Tells of nodes that fall silent, if there are others."""
    if not hosts:
        return contextlib.nullcontext()
    return Pulse(store, attempt, node_rank=node_rank, hosts=hosts, say=partial(_say, command))


def _say(command: str, sentence: str) -> None:
    print(f"megatron-vl {command}: {sentence}", file=sys.stderr, flush=True)


def _together(
    mine: End, command: str, store, attempt: int, *, hosts: Sequence[str], node_rank: int,
    timeout: float,
) -> End:
    """How an attempt ended for all nodes: they start again together, or not at all."""
    def tell(silent: set[int]) -> None:
        _say(command, f"waiting up to {timeout:g} s for {_named(silent, hosts)} to say how the run "
                      f"ended there")

    said = agree(
        store, attempt, nnodes=len(hosts), node_rank=node_rank, timeout=timeout, tell=tell,
        end={"final": mine.final, "hopeful": mine.hopeful, "code": mine.code},
    )
    end, words = decide(mine, said, hosts=hosts, timeout=timeout)
    if words:
        _say(command, words)
    return end


def decide(
    mine: End, said: dict[int, dict], *, hosts: Sequence[str], timeout: float
) -> tuple[End, str]:
    """How an attempt ended for all nodes, of which this one ended as `mine`; and what to say.

    Args:
        hosts: each node's.
    """
    if mine.final:
        return mine, ""
    for node, other in sorted(said.items()):
        if other["final"]:
            return (
                replace(mine, final=True, code=other["code"] or mine.code),
                f"{_named({node}, hosts)} ended with code {other['code']}; it says why",
            )
    if silent := set(range(len(hosts))) - set(said):
        return (
            replace(mine, final=True),
            f"{_named(silent, hosts)} did not say within {timeout:g} s how the run ended there; "
            f"see that every host is up and reaches node 0, and start all of them again, which "
            f"resumes",
        )
    return replace(mine, hopeful=any(other["hopeful"] for other in said.values())), ""


def _named(nodes: set[int], hosts: Sequence[str]) -> str:
    return ", ".join(f"node {node} ({hosts[node]})" for node in sorted(nodes))


def starts_again(end: End, attempt: int, max_restarts: int) -> bool:
    """Whether another attempt follows `attempt`, of which the first is 0."""
    return end.hopeful and not end.final and attempt < max_restarts


def end_of(failed, failure: Path, command: str) -> End:
    """How an attempt ended whose ranks failed: as the first to report says, else as they exited.

    Args:
        failed: torch's ChildFailedError.
        failure: the ranks' FAILURE_FILE; `STEPPED` and `STOP` are looked for beside it.
    """
    code, report = read_failure(failure) or (1, _no_report(command, failed))
    return End(code=code, report=report, **judge(
        code, [one.exitcode for one in failed.failures.values()],
        stepped=failure.with_name(STEPPED).exists(), stopped=failure.with_name(STOP).exists(),
    ))


def judge(code: int, exits: Iterable[int], *, stepped: bool, stopped: bool) -> dict[str, bool]:
    """What becomes of a job whose first failure has `code`, and whose failed ranks had `exits`.

    Args:
        stepped: its first step was done: what fails before it for a reason of its own, will again.
        stopped: it was asked to stop.
    """
    # By SIGTERM torch's launcher ends the others of one that failed.
    died = min(set(exits) - {-signal.SIGTERM}, default=0) < 0
    return dict(hopeful=died or stepped, final=code == 2 or stopped)


def _attempt(
    argv: list[str], scratch: Path, attempt: int, *, saves: bool, nproc_per_node: int, nnodes: int,
    node_rank: int, meeting: tuple[str, int], patience: int,
) -> End | None:
    """Start the ranks and wait for their end; None: the nodes lost one another."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The rank that failed has said why; the launcher's own report would bury it.
    for name in logging.getLogger().manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    failure = scratch / "failure"
    ours = {FAILURE_FILE: str(failure)}
    if CACHE not in os.environ:
        ours[CACHE] = _cache_dir(scratch)
    os.environ.update(ours)
    try:
        config = LaunchConfig(
            min_nodes=nnodes,
            max_nodes=nnodes,
            nproc_per_node=nproc_per_node,
            run_id=f"megatron-vl-{attempt}",  # what an earlier attempt left in the store is its own
            rdzv_backend="static",
            rdzv_endpoint="{}:{}".format(*meeting),
            rdzv_configs={"rank": node_rank, "timeout": patience},
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=str(scratch / "torchelastic")),
            **(_signals(LaunchConfig) if saves else {}),
        )
        with _stopping(failure.with_name(STOP), argv[0]) if saves else contextlib.nullcontext():
            elastic_launch(config, sys.executable)("-m", "megatron_vl", *argv)
    except ChildFailedError as error:
        return end_of(error, failure, argv[0])
    except SignalException as error:
        # Whatever the ranks reported, they were told to stop.
        name = signal.Signals(error.sigval).name
        return End(code=128 + error.sigval, report=f"megatron-vl {argv[0]}: ended by {name}\n")
    except (RendezvousError, DistError):
        return None
    finally:
        for name in ours:
            del os.environ[name]
    return End(code=0)


def _cache_dir(scratch: Path) -> str:
    """Where torch.compile keeps its kernels, for the next run too where there may be a GPU.

    Unless told, torch makes a directory for them in TMPDIR, be anything compiled or not.
    """
    if any(map(os.path.exists, DRIVERS)):
        with contextlib.suppress(OSError, RuntimeError):  # not writable, or there is no home
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            kept = Path(home, "torchinductor")
            kept.mkdir(parents=True, exist_ok=True)
            return str(kept)
    return str(scratch / "torchinductor")


@contextlib.contextmanager
def _stopping(file: Path, command: str) -> Iterator[None]:
    """Pass SIGTERM and SIGUSR1 on to the ranks as a file, which lets them save; a second one ends
    them as it does other commands."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def ask(number: int, _frame) -> None:
        name = signal.Signals(number).name
        if file.exists():
            file.with_name(AGAIN).touch()
            raise SignalException(f"a second {name}", sigval=signal.Signals(number))
        pending = file.with_suffix(".partial")
        pending.write_text(name, encoding="utf-8")
        pending.rename(file)
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"megatron-vl {command}: {name}: saving after this step, then stopping; a "
                    f"second signal ends the run at once\n".encode())

    before = {one: signal.signal(one, ask) for one in SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _signals(config_class: type) -> dict[str, str]:
    """What torch's launcher is to take for itself, to end the ranks: all that it took but ours.

    Releases of torch that cannot be told so take SIGTERM, and only SIGUSR1 lets a run save.
    """
    for one in fields(config_class):
        if one.name == "signals_to_handle":
            ours = {number.name for number in SIGNALS}
            return {one.name: ",".join(n for n in one.default.split(",") if n not in ours)}
    return {}


def _no_report(command: str, error) -> str:
    rank, first = error.get_first_failure()
    return f"megatron-vl {command}: rank {rank} {_ending(first.exitcode)}\n"


def _ending(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with code {exitcode} and no message."
    name = signal.Signals(-exitcode).name
    hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}."
