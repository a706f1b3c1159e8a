"""Run the project's commands as a user does, in their own processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
from warm import start as warm

ROOT = Path(__file__).resolve().parents[1]
RECORDER = ROOT / "tests" / "warm" / "words_of.sh"


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return f"{self.out}\n{self.err}"


def environment_with(**variables: object) -> dict[str, str]:
    """This process's variables and what every command is given, and more."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in variables.items()},
    }


def run(command: list[object], *, timeout: float = 900, **environment: object) -> Done:
    """Run a command from the project's root; `environment` is added to this process's."""
    return finish([str(word) for word in command], environment_with(**environment), timeout)


def finish(words: list[str], environment: dict[str, str], timeout: float = 900) -> Done:
    done = subprocess.run(
        words, cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True
    )
    return Done(done.returncode, done.stdout, done.stderr)


def megatron_vl(*words: object, **environment: object) -> Done:
    """`megatron-vl WORDS`."""
    return run([sys.executable, "-m", "megatron_vl", *words], **environment)


def shell(script: str, *words: object, **environment: object) -> Done:
    """`bash SCRIPT WORDS`, the script given from the project's root."""
    command = ["bash", str(ROOT / script), *map(str, words)]
    said, then, variables = executed_by(command, environment_with(**environment))
    if then is None:
        return said
    done = finish(then, variables)
    return Done(done.code, said.out + done.out, said.err + done.err)


def executed_by(
    command: list[str], environment: dict[str, str]
) -> tuple[Done, list[str] | None, dict[str, str]]:
    """As `recorded`; but where nothing is warm it is the script that runs."""
    if not warm.is_warm():
        return Done(0, "", ""), command, environment
    return recorded(command, environment)


def recorded(
    command: list[str], environment: dict[str, str]
) -> tuple[Done, list[str] | None, dict[str, str]]:
    """What a script of ours says, and the command and variables that its last line is `exec` of;
    None if it refused its arguments before."""
    with tempfile.TemporaryDirectory() as scratch:
        words = Path(scratch, "words")
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True,
            env={**environment, "PYTHON": str(RECORDER), "WORDS_OF": str(words)},
        )
        said = Done(done.returncode, done.stdout, done.stderr)
        if not words.exists():
            return said, None, {}
        variables = dict(
            one.split("=", 1)
            for one in Path(f"{words}.environment").read_text().split("\0") if one
        )
        variables["PYTHON"] = environment["PYTHON"]
        del variables["WORDS_OF"]
        return said, [environment["PYTHON"], *words.read_text().split("\0")[:-1]], variables


def imports_torch(process: psutil.Process, variable: str = "PATH") -> bool:
    """Whether it has begun to, and has `variable`."""
    try:
        # A process that is about to become another program has its parent's memory.
        return variable in process.environ() and any(
            "libtorch" in one.path for one in process.memory_maps()
        )
    except psutil.Error:  # not there yet, or gone
        return False


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
