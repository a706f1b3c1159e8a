"""One command on every host of a hostfile, over ssh; the first failure ends them all.

ssh hands what it is given to the host's shell. That is one script, in which every word that came
from a user is quoted. The host's command ends when its ssh does: it is told so by the end of ssh's
standard input, which also comes when this process is killed.
"""

from __future__ import annotations

import queue
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

from megatron_vl.errors import InputError
from megatron_vl.launch.hostfile import Host

END_SECONDS = 60  # what a command may take to end when it is told to
_SAVE_SECONDS, _CLOSE_SECONDS = 45, 5  # of them: to save, then to end without

# Watches standard input beside the command: its end ends the command, which may save on the first
# signal and ends at once on the second.
_SCRIPT = """cd {directory} || exit 2
exec 3<&0
env {variables} {command} </dev/null 3<&- &
job=$!
(cat <&3; kill "$job"; sleep {save}; kill "$job"; sleep {close}; kill -9 "$job") \
  >/dev/null 2>&1 &
watch=$!
exec 3<&-
wait "$job"
code=$?
kill "$watch" 2>/dev/null
exit "$code"
"""


def host_script(command: Sequence[str], *, directory: str, variables: Mapping[str, str]) -> str:
    """What a host's shell is given: the command in its directory, every word quoted."""
    script = _SCRIPT.format(
        directory=shlex.quote(directory),
        variables=" ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
        command=shlex.join(command), save=_SAVE_SECONDS, close=_CLOSE_SECONDS,
    )
    return f"exec sh -c {shlex.quote(script)}"


def node_variables(hosts: Sequence[Host], node: int, port: int) -> dict[str, str]:
    """The variables of PAI-DLC, by which a node knows its place."""
    variables = {
        "MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(hosts)), "RANK": str(node),
    }
    slots = hosts[node].slots
    return variables if slots is None else variables | {"NPROC_PER_NODE": str(slots)}


def run_on_hosts(
    hosts: Sequence[Host], command: Sequence[str], *, ssh: Sequence[str], port: int,
    directory: str, variables: Mapping[str, str],
) -> int:
    """Run `command` on all hosts; returns 0, or the code of the first to fail.

    Raises:
        InputError: `ssh` is no program.
    """
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    printing = threading.Lock()
    jobs, threads = [], []
    code = 0
    try:
        for node, host in enumerate(hosts):
            script = host_script(
                command, directory=directory,
                variables={**node_variables(hosts, node, port), **variables},
            )
            try:
                job = subprocess.Popen(
                    [*ssh, host.name, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            except OSError as error:
                raise InputError(
                    f"{ssh[0]} cannot be started ({error.strerror}); install ssh, or give --ssh."
                ) from error
            jobs.append(job)
            threads += [
                _start(_prefix, host.name, job.stdout, sys.stdout, printing),
                _start(_prefix, host.name, job.stderr, sys.stderr, printing),
                _start(lambda node=node, job=job: ended.put((node, job.wait()))),
            ]
        for _ in hosts:
            node, code = ended.get()
            if code:
                code = code if code > 0 else 128 - code  # ended by a signal, as a shell has it
                break
    finally:
        _end(jobs)
        for thread in threads:
            thread.join(END_SECONDS)
    if code:
        why = "; ssh itself ends so when it cannot connect" if code == 255 else ""
        print(f"megatron-vl launch: {hosts[node].name} ended with code {code}{why}; the others "
              f"were ended.", file=sys.stderr, flush=True)
    return code


def _start(work, *arguments) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def _prefix(name: str, lines, out, printing: threading.Lock) -> None:
    for line in lines:
        text = line.decode(errors="backslashreplace").rstrip("\n")
        with printing:
            print(f"[{name}] {text}", file=out, flush=True)


def _end(jobs: Sequence[subprocess.Popen]) -> None:
    """Tell the commands that still run to end, and wait for them."""
    for job in jobs:
        job.stdin.close()
    for job in jobs:
        try:
            job.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            job.kill()
