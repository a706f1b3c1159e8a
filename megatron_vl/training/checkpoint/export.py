"""SAVE/hf: the newest exported checkpoint of a run as a Hugging Face directory.

A process of its own, at low priority on rank 0's host, converts a finished checkpoint as
`megatron-vl convert` does, while training goes on. The directory takes the place of the earlier one
at once and says in EXPORTED which checkpoint it is of.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_vl.errors import InputError
from megatron_vl.models.conversion import describe
from megatron_vl.models.registry import family
from megatron_vl.peft.merge import open_whole
from megatron_vl.training.checkpoint.files import SUMS, checksum
from megatron_vl.typed import Name, Shape, read_file
from megatron_vl.weights.convert import plan_conversion, run_conversion
from megatron_vl.weights.targets import HFTarget
from megatron_vl.workers import end_with

HF = "hf"  # in SAVE
EXPORTED = "exported_from.json"  # in SAVE/hf
_PATIENCE = 10.0  # seconds that a process may take to remove what it has written


class Exported(Shape):
    """EXPORTED: which checkpoint a directory was made of."""

    checkpoint: Name  # its directory's name
    sums: Name  # the SHA-256 of its SHA256SUMS, which tells it from others of that name


@dataclass(frozen=True, kw_only=True, slots=True)
class _ExportTarget(HFTarget):
    checkpoint: Path

    def finish(self, root: Path, dtype: str) -> None:
        HFTarget.finish(self, root, dtype)
        text = json.dumps(_mark(self.checkpoint).model_dump(), indent=1)
        (root / EXPORTED).write_text(f"{text}\n", encoding="utf-8")


def _mark(checkpoint: Path) -> Exported:
    return Exported(checkpoint=checkpoint.name, sums=checksum(checkpoint / SUMS))


def exported(save: Path) -> Exported | None:
    """What SAVE/hf was made of; None where nothing says it."""
    try:
        return read_file(save / HF / EXPORTED, Exported, mend="")
    except InputError:
        return None


def _is_exported(checkpoint: Path) -> bool:
    try:
        return exported(checkpoint.parent) == _mark(checkpoint)
    except OSError:  # the export meets that too, and tells it
        return False


def by_hand(checkpoint: Path) -> str:
    """The command that makes SAVE/hf of a checkpoint of SAVE."""
    save = checkpoint.parent
    return shlex.join(["megatron-vl", "convert", str(checkpoint), str(save / HF), "--to", "hf",
                       "--hf-config", str(save), "--overwrite"])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    checkpoint: Path
    process: subprocess.Popen
    said: IO[str]  # what it prints
    started: float  # by time.perf_counter


class Exporter:
    """Rank 0's: exports one checkpoint at a time, and of those that wait the newest.

    Args:
        say: tells a line.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.failed = ""  # why the last one did, if it did
        self._job: _Job | None = None
        self._next: Path | None = None

    @property
    def held(self) -> set[str]:
        """Names of the checkpoints that are being exported, or wait for it."""
        return {one.name for one in (self._job and self._job.checkpoint, self._next) if one}

    def export(self, checkpoint: Path) -> None:
        """Begin, or as soon as the export that runs has ended; nothing if it is done already."""
        if checkpoint.name in self.held or _is_exported(checkpoint):
            return
        if self._next is not None:
            self.say(f"{self._next} is not exported: {self._job.checkpoint.name} still is, and "
                     f"{checkpoint.name} is newer")
        self._next = checkpoint
        self.poll()

    def poll(self) -> bool:
        """Tell an export that has ended and begin the next; answers whether one runs."""
        if self._job is not None and self._job.process.poll() is not None:
            self._tell()
        if self._job is None and self._next is not None:
            checkpoint, self._next = self._next, None
            try:
                self._job = _begin(checkpoint)
            except OSError as error:  # of want of memory, or of room for a file
                self._fail(checkpoint, str(error))
        return self._job is not None

    def give_up(self, last: Path, why: str) -> None:
        """End what runs and forget what waits; say why, and how to export `last` by hand."""
        if self._job is not None:
            self._job.process.terminate()
            try:
                self._job.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._job.process.kill()
            self._job.said.close()
        self._job, self._next, self.failed = None, None, ""
        if not _is_exported(last):
            self.say(f"{last} is not exported, as {why}; {by_hand(last)} does so")

    def _tell(self) -> None:
        job, self._job = self._job, None
        seconds, code = time.perf_counter() - job.started, job.process.returncode
        with job.said:
            job.said.seek(0)
            *_, last = ["", *job.said.read().strip().splitlines()]
        if code == 0:
            self.failed = ""
            self.say(f"exported {job.checkpoint} to {job.checkpoint.parent / HF} in "
                     f"{seconds:.1f} s")
        else:
            ended = f"its process was ended by {signal.Signals(-code).name}" if code < 0 else last
            self._fail(job.checkpoint, ended)

    def _fail(self, checkpoint: Path, why: str) -> None:
        self.failed = (f"{checkpoint}: {why.rstrip('.')}; once that is mended, "
                       f"{by_hand(checkpoint)} exports it")
        self.say(f"NOT EXPORTED: {self.failed}")


def _begin(checkpoint: Path) -> _Job:
    said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(checkpoint), str(os.getpid())],
        stdin=subprocess.DEVNULL, stdout=said, stderr=said,
    )
    return _Job(checkpoint=checkpoint, process=process, said=said, started=time.perf_counter())


# ---- in the process ---------------------------------------------------------------------------


def convert(checkpoint: Path) -> None:
    """Make SAVE/hf of a checkpoint of SAVE; every tensor keeps its dtype.

    Raises:
        InputError: the checkpoint cannot be read, or SAVE/hf not be written.
    """
    save = checkpoint.parent
    found = describe(checkpoint, save)
    weights = family(found.spec.model_type).weight_map(found.spec)
    source = open_whole(checkpoint, found.info, weights)
    conversion = plan_conversion(source, weights, _ExportTarget(checkpoint=checkpoint))
    run_conversion(conversion, save / HF, side_files=save, overwrite=True)


def main(checkpoint: Path, parent: int) -> None:
    # A rank takes signals in a thread, and what it starts inherits that they are blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
    end_with(parent, signal.SIGTERM)
    os.nice(19)
    try:
        convert(checkpoint)
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
