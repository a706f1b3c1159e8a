"""What the test processes of a run make once and then only read."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


class Shared:
    """A directory of the run."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(exist_ok=True)

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """The path that `make` was given; who comes while it is being made waits."""
        path, done = self.root / name, self.root / f".{name} is made"
        with (self.root / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)  # of one that failed
                make(path)
                done.touch()
        return path
