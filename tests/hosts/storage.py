"""Shared storage: a directory, and clients that mount it with their own caches; see
`storage_server.py`. Nothing here is NFS, which needs a kernel with its client."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from commands import environment_with

PROGRAM = Path(__file__).with_name("storage_server.py")


def why_not() -> str:
    """Why this machine cannot have shared storage; empty if it can."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK):
        return "shared storage needs root and /dev/fuse"
    if shutil.which("fusermount3") is None or importlib.util.find_spec("mfusepy") is None:
        return "shared storage needs fuse3 and mfusepy"
    return ""


class Storage:
    """What is stored is in `root / "server"`."""

    def __init__(self, root: Path):
        self.directory, self._control = root / "server", root / "control.json"
        self.directory.mkdir(parents=True)
        self.tell()

    def tell(self, **state: object) -> None:
        """How the server is from now on; see `storage_server.py`."""
        new = self._control.with_suffix(".new")
        new.write_text(json.dumps(state))
        new.rename(self._control)

    def client(self, mount: Path, stale: float = 0) -> list[object]:
        """The command of a client; it runs until it is unmounted."""
        return [sys.executable, PROGRAM, self.directory, mount, self._control, stale]

    @contextlib.contextmanager
    def mounted(self, mount: Path, stale: float = 0) -> Iterator[Path]:
        """With a client of this machine's."""
        mount.mkdir()
        client = subprocess.Popen(list(map(str, self.client(mount, stale))),
                                  env=environment_with())
        try:
            wait_until(lambda: os.path.ismount(mount))
            yield mount
        finally:
            subprocess.run(["umount", "--lazy", mount], check=False)
            client.kill()
            client.wait()


def wait_until(what, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.05)
