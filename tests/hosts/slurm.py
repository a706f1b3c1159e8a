"""A Slurm cluster of `Hosts`: real daemons, of which each node's run on a host of its own.

The host `ctl` has slurmctld, and is where jobs are submitted. All of it is in one directory, and
ends with the hosts. Each node has a GPU by Slurm's count, so that a job may ask for one; there is
none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import psutil

from hosts import Hosts
from hosts import why_not as no_hosts
from hosts.storage import wait_until

NODES = ("n1", "n2")
CORES = 4  # of a node, whatever the machine has
_TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
# Jobs of the partition `urgent` preempt those of `work`, which have GRACE seconds to end.
GRACE = 30
_CONFIG = """
ClusterName=test
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=/run/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=15
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-2] CPUs={cores} Gres=gpu:1
PartitionName=work Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def why_not() -> str:
    """Why this machine cannot have a Slurm cluster; empty if it can."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [tool for tool in _TOOLS if shutil.which(tool, path=path) is None]:
        return f"Slurm is not installed: no {', '.join(missing)}"
    return no_hosts()


class Slurm:
    """A cluster that takes jobs.

    Args:
        root: an empty directory for its files.
    """

    def __init__(self, root: Path):
        self.root = root
        (root / "hosts").mkdir()
        (root / "state").mkdir()
        (root / "slurm.conf").write_text(_CONFIG.format(root=root, cores=CORES, grace=GRACE))
        # Slurm wants a file of a GPU, and does not open it.
        (root / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        key = root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.hosts = Hosts(root / "hosts", "ctl", *NODES)
        try:
            for name in ("ctl", *NODES):
                self._start_munged(name)
            self._start("ctl", "slurmctld")
            for name in NODES:
                (root / f"spool-{name}").mkdir()
                self._start_slurmd(name)
            wait_until(lambda: self.said("sinfo", "-h", "-o", "%T").split() == ["idle"], 60)
        except BaseException:
            self.hosts.close()
            raise

    def __enter__(self) -> Slurm:
        return self

    def __exit__(self, *_) -> None:
        self.hosts.close()

    def _start_munged(self, name: str) -> None:
        files = [f"--{file}-file=/run/munge.{file}" for file in ("pid", "log", "seed")]
        self.hosts[name].run(
            "/usr/sbin/munged", "--force", f"--key-file={self.root / 'munge.key'}",
            "--socket=/run/munge.socket", *files, check=True,
        )

    def _start_slurmd(self, name: str) -> None:
        self._start(name, "slurmd", "-N", name)

    def _start(self, name: str, daemon: str, *words: str) -> None:
        conf = self.root / "slurm.conf"
        self.hosts[name].start([f"/usr/sbin/{daemon}", "-D", "-f", conf, *words])

    def said(self, *command: object, cwd: Path | None = None, **environment: object) -> str:
        """What a command of Slurm says on `ctl`, which must be well."""
        return self.hosts["ctl"].run(
            *command, cwd=cwd or self.root, check=True, SLURM_CONF=self.root / "slurm.conf",
            **environment,
        ).out.strip()

    def submit(self, *words: object, cwd: Path, **environment: object) -> str:
        """`sbatch WORDS` in a directory; returns the job's number."""
        return self.said("sbatch", "--parsable", *words, cwd=cwd, **environment)

    def state(self, job: str) -> str:
        return self.facts(job)["JobState"]

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.said("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def lose(self, name: str) -> None:
        """A node's power goes."""
        host = self.hosts[name]
        host.cut()
        for one in host.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if one.pid != host.pid and one.name() != "munged":
                    one.kill()

    def restart(self, name: str) -> None:
        """A lost node has started again."""
        self.hosts[name].mend()
        self._start_slurmd(name)
