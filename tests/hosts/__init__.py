"""Hosts on one machine: each with a name, processes, an address, mounts and an sshd of its own.

A host is a set of Linux namespaces that one process holds. That process dies with this one, even by
SIGKILL, and all that the host has ends with it: processes, mounts, devices. Nothing has a name
outside of the namespaces, so tests run side by side, and no frame leaves the wire between the hosts
(see `wire.py`). Hosts share the machine's files, as hosts do that mount the same storage; `mount`
gives one a file system of its own. Their wall clock is the machine's.

    with Hosts(tmp_path, "one", "two") as hosts:
        job = hosts["one"].start(["ssh", "two", "hostname"])
        hosts["two"].cut()
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from commands import ROOT, Done, environment_with

WIRE = Path(__file__).with_name("wire.py")
NETWORK = "10.77.0"
_NAMESPACES = ("--net", "--mount", "--uts", "--pid", "--ipc")
_ALONE = ("setpriv", "--pdeathsig", "KILL", "unshare")
_TOOLS = ("setpriv", "unshare", "nsenter", "ip", "setsid", "ssh", "ssh-keygen", "sshd")
# The first process of a host. It takes in the orphans of the others.
_INIT = """set -e
hostname "$1"
mount --bind "$2/hosts.$1" /etc/hosts
mount --bind "$2/ssh" /etc/ssh
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd
if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
ip link set lo up
echo ready
while :; do sleep 3600 & wait; done
"""
_SSHD = """AuthorizedKeysFile /etc/ssh/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
"""


def why_not() -> str:
    """Why this machine cannot have hosts; empty if it can."""
    if os.geteuid() != 0:
        return "only root may make the namespaces of hosts"
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [tool for tool in _TOOLS if shutil.which(tool, path=path) is None]:
        return f"hosts need {', '.join(missing)}"
    if not os.access("/dev/net/tun", os.W_OK):
        return "hosts need /dev/net/tun"
    tried = subprocess.run(["unshare", *_NAMESPACES, "--fork", "--mount-proc", "true"],
                           capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


class Hosts:
    """Hosts on one wire, by name.

    Args:
        root: a directory for their keys and files, which exists.
        names: host names; the first host has the address NETWORK.1.
    """

    def __init__(self, root: Path, *names: str):
        self.root, self.all = root, {}
        (root / "ssh").mkdir()
        _key(root / "ssh" / "id")
        shutil.copy(root / "ssh" / "id.pub", root / "ssh" / "authorized_keys")
        (root / "ssh" / "ssh_config").write_text("Host *\n IdentityFile /etc/ssh/id\n")
        (root / "ssh" / "sshd_config").write_text(_SSHD)
        self.known = root / "ssh" / "ssh_known_hosts"
        self._wire = subprocess.Popen(
            [*_ALONE, "--net", sys.executable, "-S", WIRE], text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        try:
            for name in names:
                self.add(name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for host in self:
            host.kill()
        self._wire.kill()
        self._wire.communicate()

    def __getitem__(self, name: str) -> Host:
        return self.all[name]

    def __iter__(self):
        return iter(self.all.values())

    def add(self, name: str) -> Host:
        """A further host, which all others know by name and key."""
        number = len(self.all) + 1
        key = self.root / "ssh" / f"host.{name}"
        _key(key)
        address = f"{NETWORK}.{number}"
        public = Path(f"{key}.pub").read_text()
        with self.known.open("a") as file:
            file.write(f"{name},{address} {public}")
        lines = [(one.address, one.name) for one in self] + [(address, name)]
        text = "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in lines)
        for one in [one.name for one in self] + [name]:
            (self.root / f"hosts.{one}").write_text(text)
        host = self.all[name] = Host(self, name, address)
        self.order("add", number, host.pid)
        host.run("ip", "address", "add", f"{address}/24", "dev", "eth0", check=True)
        host.run("ip", "link", "set", "eth0", "up", check=True)
        host.start_sshd()
        return host

    def order(self, *words: object) -> None:
        """A command of `wire.py`."""
        self._wire.stdin.write(" ".join(map(str, words)) + "\n")
        assert self._wire.stdout.readline() == "ok\n", words


class Host:
    """One of `Hosts`. `pid` is its first process, as this machine numbers it."""

    def __init__(self, hosts: Hosts, name: str, address: str):
        self.hosts, self.name, self.address = hosts, name, address
        self.number = int(address.rpartition(".")[2])
        log = hosts.root / f"{name}.log"
        with log.open("w") as file:
            self._holder = subprocess.Popen(
                [*_ALONE, *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c",
                 _INIT, "bash", name, hosts.root], stdout=subprocess.PIPE, stderr=file, text=True,
            )
        assert self._holder.stdout.readline() == "ready\n", log.read_text()
        self.pid = psutil.Process(self._holder.pid).children()[0].pid

    # ---- commands -----------------------------------------------------------------------------

    def start(self, command: list[object], *, cwd: Path = ROOT, **environment: object) -> Job:
        """Start a command there, in a session of its own, with this process's variables and more.

        `Job.text` is what it has said.
        """
        log = self.hosts.root / f"job{time.monotonic_ns()}.log"
        inside = ["nsenter", "--target", self.pid, *_NAMESPACES, f"--wdns={cwd}", "setsid",
                  "env", "--default-signal=INT,HUP", *command]
        with log.open("w") as file:
            return Job(log, list(map(str, inside)), environment_with(**environment), file)

    def run(self, *command: object, check: bool = False, **options: object) -> Done:
        """Run a command there to its end; `check`: which must be well."""
        job = self.start(list(command), **options)
        done = Done(job.wait(timeout=120), job.text, "")
        assert not check or done.code == 0, done.text
        return done

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Those that run there, but for its first, and have `word` in their command line."""
        space, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # it has ended meanwhile
                here = one.pid != self.pid and os.readlink(f"/proc/{one.pid}/ns/pid") == space
                if here and word in " ".join(one.cmdline()):
                    found.append(one)
        return found

    # ---- what can be done to it ---------------------------------------------------------------

    def start_sshd(self) -> None:
        self.run("/usr/sbin/sshd", "-h", f"/etc/ssh/host.{self.name}", check=True)

    def stop_sshd(self) -> None:
        """It takes no connection any more."""
        for one in self.processes("sshd"):
            one.kill()

    def mount(self, path: Path, size: str = "100%") -> None:
        """An empty file system of its own at `path`, full after `size`."""
        self.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path, check=True)

    def cut(self) -> None:
        """Nobody reaches it, nor it anybody; no connection is told of it."""
        self.hosts.order("cut", self.number)

    def mend(self) -> None:
        self.hosts.order("mend", self.number)

    def kill(self) -> None:
        """As its power goes: no connection is closed first."""
        if self._holder.poll() is None:
            self.cut()
            os.kill(self.pid, signal.SIGKILL)
        self._holder.wait()
        self._holder.stdout.close()


class Job(subprocess.Popen):
    """A command on a host."""

    def __init__(self, log: Path, command: list[str], environment: dict[str, str], file):
        self._log = log
        super().__init__(command, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                         stderr=subprocess.STDOUT)

    @property
    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def signal(self, number: int, *, group: bool = False) -> None:
        """To the command; or to all of its group, as the keyboard sends them."""
        (inside,) = psutil.Process(self.pid).children()
        (os.killpg if group else os.kill)(inside.pid, number)

    def wait_for(self, *words: str, seconds: float = 120) -> None:
        """Until it has said all `words`."""
        deadline = time.monotonic() + seconds
        while missing := [word for word in words if word not in self.text]:
            assert time.monotonic() < deadline, f"{missing} not within {seconds} s:\n{self.text}"
            assert self.poll() is None, f"{missing} not said:\n{self.text}"
            time.sleep(0.05)


def _key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
