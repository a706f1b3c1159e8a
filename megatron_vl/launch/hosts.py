"""One command on every host of a hostfile, over ssh; the first failure ends them all.

ssh hands what it is given to the host's shell. That is one script, in which every word that came
from a user is quoted. It says whether the host can run the command, and runs it once all hosts can.
The host's command ends when its ssh does: it is told so by the end of ssh's standard input, which
also comes when this process is killed.
"""

from __future__ import annotations

import contextlib
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.launch.hostfile import Host

END_SECONDS = 60  # what a command may take to end when it is told to
_SAVE_SECONDS, _CLOSE_SECONDS = 45, 5  # of them: to save, then to end without
# For OpenSSH, behind the user's own options, which win: no question, and no endless wait for a host
# that is gone. A link may be cut for ten minutes, longer than a run waits for its ranks.
_SSH_OPTIONS = ("BatchMode=yes", "ConnectTimeout=30", "ServerAliveInterval=15",
                "ServerAliveCountMax=40")

TOLD = 3  # hosts that a refusal tells; all are counted
_MARK = "megatron-vl launch:"  # begins what the script tells this process: READY, or what is amiss
_READY = "ready"
# Watches standard input beside the command: its end ends the command, which may save on the first
# signal and ends at once on the second.
_SCRIPT = """cd {directory} 2>/dev/null || {{ echo {mark} no directory {directory}; exit 2; }}
env {variables} {check} || {{ echo {mark} no {what}; exit 2; }}
exec 3<&0
echo {mark} {ready}
read -r go <&3 || exit 0
env {variables} {command} </dev/null 3<&- &
job=$!
until_it_ends() {{ n=0; while [ $n -lt $1 ] && kill -0 "$job"; do sleep 1; n=$((n + 1)); done; }}
(cat <&3; kill "$job"; until_it_ends {save}; kill "$job"; until_it_ends {close}; kill -9 "$job") \
  >/dev/null 2>&1 &
watch=$!
exec 3<&-
wait "$job" 2>/dev/null
code=$?
kill "$watch" 2>/dev/null
exit "$code"
"""
# What ssh says when it cannot connect -> the mend.
_MENDS = {
    "Host key verification failed": "compare the host's key, then log in once by hand to accept it "
    "(`ssh-keygen -R {name}` removes an old one)",
    "Permission denied": "put your public key there, as `ssh-copy-id {name}` does; a key with a "
    "passphrase has to be in ssh-agent",
    "Connection refused": "start sshd there, or give its port as --ssh 'ssh -p PORT'",
    "Could not resolve": "write the host's address into the hostfile",
    "": "see whether it is up and this machine reaches it",
}


def host_script(
    command: Sequence[str], *, directory: str, variables: Mapping[str, str], package: str = ""
) -> str:
    """What a host's shell is given: the command in its directory, every word quoted.

    Args:
        package: which the command, a Python, has to find there; none: any program.
    """
    finds = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    check = [command[0], "-c", finds] if package else ["sh", "-c", 'command -v "$0"', command[0]]
    script = _SCRIPT.format(
        mark=_MARK, ready=_READY, directory=shlex.quote(directory),
        variables=" ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
        check=f"{shlex.join(check)} >/dev/null 2>&1", command=shlex.join(command),
        what=shlex.quote(f"{package} for {command[0]}" if package else f"program {command[0]}"),
        save=_SAVE_SECONDS, close=_CLOSE_SECONDS,
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
    directory: str, variables: Mapping[str, str], package: str = "",
) -> int:
    """Run `command` on all hosts; returns 0, or the code of the first to fail.

    Args:
        package: see `host_script`.

    Raises:
        InputError: `ssh` is no program, or a host cannot run the command; then none has begun to.
    """
    if Path(ssh[0]).name == "ssh":
        ssh = [*ssh, *(word for option in _SSH_OPTIONS for word in ("-o", option))]
    printing = threading.Lock()
    links: list[_Link] = []
    said, ended = queue.Queue(), queue.Queue()
    with _ending(links):
        for node, host in enumerate(hosts):
            script = host_script(
                command, directory=directory, package=package,
                variables={**node_variables(hosts, node, port), **variables},
            )
            links.append(_Link(host.name, [*ssh, host.name, script], said, ended, printing))
        heard = _first_words(links, said)
        if amiss := [link.why_not(heard[link]) for link in links if heard[link] != _READY]:
            more = f"; and {len(amiss) - TOLD} more hosts" if len(amiss) > TOLD else ""
            raise InputError("; ".join(amiss[:TOLD]) + f"{more}.")
        for link in links:
            link.begin()
        for _ in links:
            link, code = ended.get()
            if code:
                break
    if code:
        why = "; ssh itself ends so when it loses the host" if code == 255 else ""
        print(f"{_MARK} {link.name} ended with code {code}{why}; the others were ended.",
              file=sys.stderr, flush=True)
    return code


def _first_words(links: Sequence[_Link], said: queue.Queue) -> dict[_Link, str]:
    """What every host's script says first; who is waited for is told while it lasts."""
    heard: dict[_Link, str] = {}
    while len(heard) < len(links):
        try:
            link, words = said.get(timeout=END_SECONDS)
            heard[link] = words
        except queue.Empty:
            names = ", ".join(link.name for link in links if link not in heard)
            print(f"{_MARK} still waiting for {names}; see what a login there waits for",
                  file=sys.stderr, flush=True)
    return heard


class _Link:
    """One host's ssh. What the host prints is printed behind its name.

    Args:
        said: gets this link and what the script says first; "" where ssh ends before it.
        ended: gets this link and its command's exit code.

    Raises:
        InputError: ssh cannot be started.
    """

    def __init__(self, name: str, command: Sequence[str], said: queue.Queue, ended: queue.Queue,
                 printing: threading.Lock):
        self.name, self._ssh = name, command[0]
        self._said, self._ended, self._printing = said, ended, printing
        self._ready = threading.Event()
        self._complaints: list[str] = []  # of ssh, before the host is ready
        try:
            self.job = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for this process, which ends the hosts
            )
        except OSError as error:
            raise InputError(
                f"{command[0]} cannot be started ({error.strerror}); install ssh, or give --ssh."
            ) from error
        self._readers = [_start(self._read_output), _start(self._read_errors)]
        self._waiting = _start(self._wait)

    def begin(self) -> None:
        for line in self._complaints:  # warnings, as it turned out
            self._print(line, sys.stderr)
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is an event
            self.job.stdin.write(b"go\n")
            self.job.stdin.flush()

    def end(self) -> None:
        """Tell the command to end, if it runs."""
        with contextlib.suppress(BrokenPipeError):
            self.job.stdin.close()

    def wait(self, until: float) -> None:
        """For its end, and all it said to be printed; `until`, by time.monotonic, at most."""
        try:
            self.job.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"{_MARK} {self.name} did not end within {END_SECONDS} s of being told to; see "
                  f"what still runs there.", file=sys.stderr, flush=True)
            self.job.kill()
        for thread in (*self._readers, self._waiting):
            thread.join(_CLOSE_SECONDS)

    def why_not(self, words: str) -> str:
        """Why the host cannot run the command, and the mend."""
        if words:
            return f"{self.name} has {words}; every host needs it at the same place"
        said = [line for line in self._complaints if line.strip()]
        why = said[-1].strip() if said else f"code {self.job.returncode} and no message"
        mend = next(mend for sign, mend in _MENDS.items() if sign in why)
        return f"{self._ssh} cannot start anything on {self.name} ({why}): " + mend.format(
            name=self.name)

    def _read_output(self) -> None:
        for line in _lines(self.job.stdout):
            if self._ready.is_set() or not line.startswith(_MARK):
                self._print(line, sys.stdout)
                continue
            self._ready.set()
            self._said.put((self, line.removeprefix(_MARK).strip()))

    def _read_errors(self) -> None:
        for line in _lines(self.job.stderr):
            if self._ready.is_set():
                self._print(line, sys.stderr)
            else:
                self._complaints.append(line)

    def _wait(self) -> None:
        code = self.job.wait()
        for reader in self._readers:
            reader.join()
        if not self._ready.is_set():
            self._said.put((self, ""))
        self._ended.put((self, code if code >= 0 else 128 - code))  # as a shell has it

    def _print(self, text: str, out) -> None:
        with self._printing:
            print(f"[{self.name}] {text}", file=out, flush=True)


def _lines(stream) -> Iterator[str]:
    for line in stream:
        yield line.decode(errors="backslashreplace").rstrip("\r\n")


def _start(work) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def _ending(links: list[_Link]) -> Iterator[None]:
    """Whatever ends this process's part ends the hosts' commands, SIGTERM like Ctrl-C; what they
    still say is printed."""
    def leave(number: int, _frame) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print(f"{_MARK} ending the hosts' commands, which save first; once more leaves them to it",
              file=sys.stderr, flush=True)
        raise
    finally:
        for link in links:
            link.end()
        until = time.monotonic() + END_SECONDS
        for link in links:
            link.wait(until)
        signal.signal(signal.SIGTERM, before)
