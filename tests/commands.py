"""Run the project's commands as a user does, in their own processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return f"{self.out}\n{self.err}"


def run(command: list[object], *, timeout: float = 900, **environment: object) -> Done:
    """Run a command from the project's root; `environment` is added to this process's."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in environment.items()},
    }
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=env, timeout=timeout,
        capture_output=True, text=True,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def megatron_vl(*words: object, **environment: object) -> Done:
    """`megatron-vl WORDS`."""
    return run([sys.executable, "-m", "megatron_vl", *words], **environment)


def shell(script: str, *words: object, **environment: object) -> Done:
    """`bash SCRIPT WORDS`, the script given from the project's root."""
    return run(["bash", ROOT / script, *words], **environment)
