"""Runs over hosts of their own, started by the real ssh: see tests/hosts."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from hosts import Host, Hosts, Job, why_not
from training_over_hosts import Training, launch

pytestmark = [
    pytest.mark.cold,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs"),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts"), "one", "two", "three") as made:
        yield made


def without_key(hosts: Hosts, two: Host) -> None:
    lines = hosts.known.read_text().splitlines(keepends=True)
    hosts.known.write_text("".join(one for one in lines if not one.startswith("two,")))


def with_anothers_key(hosts: Hosts, two: Host) -> None:
    known = hosts.known.read_text()
    hosts.known.write_text(known.replace("two,10.77.0.2 ", "").replace("three,10.77.0.3", "two"))


def with_a_python_of_its_own(hosts: Hosts, two: Host) -> None:
    """At the same place, and without our packages."""
    python = hosts.root / "python"
    python.write_text("#!/bin/sh\nexec /usr/bin/false\n")
    python.chmod(0o755)
    two.run("mount", "--bind", python, os.path.realpath(sys.executable), check=True)


REFUSALS = {  # what is done to host two -> what is said of it
    "no sshd": (
        lambda _, two: two.stop_sshd(),
        "ssh cannot start anything on two (ssh: connect to host two port 22: Connection refused): "
        "start sshd there, or give its port as --ssh 'ssh -p PORT'."),
    "unknown": (
        without_key,
        "ssh cannot start anything on two (Host key verification failed.): compare the host's key, "
        "then log in once by hand to accept it (`ssh-keygen -R two` removes an old one)."),
    "another's key": (with_anothers_key, "ssh cannot start anything on two (Host key verification"),
    "our key is none of its": (
        lambda _, two: two.run("mount", "--bind", "/dev/null", "/etc/ssh/authorized_keys",
                               check=True),
        "ssh cannot start anything on two (root@two: Permission denied (publickey).): put your "
        "public key there, as `ssh-copy-id two` does; a key with a passphrase has to be in "
        "ssh-agent."),
    "cut off": (
        lambda _, two: two.cut(),
        "ssh cannot start anything on two (ssh: connect to host two port 22: Connection timed "
        "out): see whether it is up and this machine reaches it."),
    "no directory": (
        lambda hosts, two: two.mount(hosts.root / "here"),
        "two has no directory {root}/here/run; every host needs it at the same place."),
    "no megatron_vl": (
        with_a_python_of_its_own,
        f"two has no megatron_vl for {sys.executable}; every host needs it at the same place."),
}


@pytest.mark.parametrize(("harm", "said"), REFUSALS.values(), ids=REFUSALS)
def test_a_host_that_cannot_run_is_named_with_the_mend_and_nothing_starts(
        harm: Callable[[Hosts, Host], object], said, tmp_path):
    with Hosts(tmp_path, "one", "two", "three") as hosts:
        here = tmp_path / "here" / "run"
        here.mkdir(parents=True)
        harm(hosts, hosts["two"])
        job = launch(hosts["one"], ["one", "two", "three"], "train", "--save", here / "save",
                     options=("--ssh", "ssh -o ConnectTimeout=1"), cwd=here)
        assert job.wait(timeout=60) == 2, job.text
        told = said.format(root=tmp_path)
        assert job.text.startswith(f"megatron-vl launch: {told}") and job.text.count("\n") == 1
        assert not list(here.iterdir())
        assert not any(host.processes("megatron_vl") for host in hosts)


def test_the_environment_directory_and_output_are_the_commands_own(hosts, tmp_path):
    script = 'echo "$(hostname) $RANK of $WORLD_SIZE at $MASTER_ADDR: $PWD, $WORD"'
    here = tmp_path / "it's $HOME"
    here.mkdir()
    job = launch(hosts["three"], ["one", "root@two"], "sh", "-c", script, cwd=here,
                 options=("--env", "WORD=two  words"))
    assert job.wait(timeout=60) == 0, job.text
    assert sorted(job.text.splitlines()) == [
        f"[one] one 0 of 2 at one: {here}, two  words",
        f"[root@two] two 1 of 2 at one: {here}, two  words",
    ]


@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, -1), (signal.SIGKILL, -9),
], ids=lambda one: getattr(one, "name", None))
def test_however_the_launcher_ends_every_hosts_command_is_told_to(number, code, hosts):
    wait = "trap 'echo told; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    job = launch(hosts["one"], ["one", "two", "three"], "sh", "-c", wait)
    until(lambda: job.text.count("up") == 3, job)
    job.signal(number, group=True)  # as the keyboard does, also to what it has started
    assert job.wait(timeout=60) == code
    if code > 0:
        assert job.text.count("] told") == 3
    until(lambda: not any(host.processes("trap") for host in hosts), job)


def test_two_hosts_of_two_processes_survive_a_cut_link_and_save_on_ctrl_c(
        hosts, workshop, tmp_path):
    """The hosts' names lead to themselves alone, as Debian installs them."""
    training = Training(workshop, tmp_path, nproc_per_node=2)
    for host in hosts:
        names = hosts.root / f"hosts.{host.name}"
        names.write_text(names.read_text().replace(f"{host.address} {host.name}",
                                                   f"127.0.1.1 {host.name}"))
    job = training.start(hosts["three"], ["one", "two"], train_iters=10_000)
    training.wait_for_step(3, job)
    hosts["two"].cut()
    time.sleep(2)
    seen = len(training.losses)
    hosts["two"].mend()
    training.wait_for_step(seen + 2, job)
    job.signal(signal.SIGINT, group=True)
    assert job.wait(timeout=60) == 130, job.text
    assert "[one] preflight: 4 ranks on 2 hosts agree" in job.text
    assert "[two] megatron-vl train: the name two is no address for other hosts here, so ranks " \
        "listen at 10.77.0.2 (GLOO_SOCKET_IFNAME eth0)" in job.text
    done = max(training.losses)
    assert f"[one] asked to stop; {done} steps are done, the same command goes on" in job.text
    assert (training.save / f"iter_{done:07d}").is_dir()
    assert not any(host.processes("megatron_vl") for host in hosts)
    assert not any(word in job.text for word in ("[c10d]", "frame #", "Traceback")), job.text


def until(what: Callable[[], bool], job: Job, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, job.text
        time.sleep(0.05)
