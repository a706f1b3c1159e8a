"""Writes a run's checkpoints, at once or behind training, so that none is ever lost or half there.

A checkpoint is written under a hidden name. When every rank has written and hashed its files, rank
0 writes the checksums, gives the directory its name and says that it is the latest. With async_save
Megatron-Core forks a process on every rank that does the writing: it sees the weights as they were
at that moment, whatever training does to them meanwhile.

A save that fails, as on a full disk, fails on all ranks alike: what was written of it goes, the
checkpoints before stay, and training goes on.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from torch.distributed.checkpoint import CheckpointException

from megatron_vl.platform import current_device
from megatron_vl.platform.checkpoints import begin_save
from megatron_vl.training.checkpoint.files import (
    checksum,
    delete_old,
    partial_folder,
    publish,
    read_checksums,
    write_checksums,
)
from megatron_vl.training.resilience.stragglers import host_names
from megatron_vl.weights.files import reserve

_PART = ".sha256.{}"  # what a rank wrote, until rank 0 has made one list of them
_ROOM_BYTES = 2**20  # kept for the small files that rank 0 writes last, and a tensor:
_ROOM_BYTES_A_TENSOR = 2**10


class SaveError(Exception):
    """A checkpoint could not be written; raised on all ranks alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A save that has ended."""

    iteration: int
    path: Path
    seconds: float  # since it began
    deleted: tuple[int, ...] = ()  # iterations that were let go for it
    error: str = ""  # why it failed; empty: it is complete
    warning: str = ""  # what else did not work


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    iteration: int
    started: float  # by time.perf_counter


class Saver:
    """All ranks create it together and call its methods together; rank 0 holds SAVE's lock.

    Args:
        root: SAVE.
        behind: write behind training.
        limit: complete checkpoints to keep; None keeps all.
        held: names of further ones that are still in use; rank 0 is asked.
    """

    def __init__(
        self, root: Path, *, behind: bool = False, limit: int | None = None,
        held: Callable[[], Container[str]] = tuple,
    ):
        self.root, self.behind, self.limit, self.held = root, behind, limit, held
        self.first = torch.distributed.get_rank() == 0
        self.hosts = host_names()
        self.queue = AsyncCallsQueue()
        self.pending: _Pending | None = None
        if self.first:  # what a run left that was ended while it saved
            for pattern in (".iter_*.partial", ".iter_*.deleted"):
                for leftover in root.glob(pattern):
                    _clear(leftover)

    def save(
        self, iteration: int, state: Callable[[], dict], *, content: dict,
        begin: Callable[[Path], None], extra: Callable[[Path], list[str]],
    ) -> list[Saved]:
        """Save, or begin to; returns the saves that have ended with it.

        Args:
            state: makes Megatron-Core's sharded state dict.
            content: what Megatron-Core is to say of it.
            begin: rank 0's, before anything is written; gets the directory.
            extra: writes what is not part of the state; gets the directory, gives its files' names.
        """
        ended = self.poll(wait=True)  # one at a time: memory holds one copy
        pending = _Pending(iteration=iteration, started=time.perf_counter())
        folder = partial_folder(self.root, iteration)
        try:
            self._together(self.first, lambda: self._begin(folder, begin))
            request = self._request(folder, state(), content, extra)
            self.pending = pending
            if self.behind:
                self.queue.schedule_async_request(request)
                return ended
            request.execute_sync()
        except (SaveError, CheckpointException) as error:
            self.pending = pending
            return [*ended, self._failed(error)]
        return [*ended, self._finished()]

    def poll(self, *, wait: bool = False) -> list[Saved]:
        """The saves behind training that have ended on every rank; with `wait` all of them."""
        if self.queue.get_num_unfinalized_calls() == 0:
            return []
        try:
            if not self.queue.maybe_finalize_async_calls(blocking=wait):
                return []
        except (SaveError, CheckpointException) as error:
            return [self._failed(error)]
        return [self._finished()]

    # ---- steps of one save --------------------------------------------------------------------

    def _begin(self, folder: Path, begin: Callable[[Path], None]) -> None:
        _clear(folder)
        folder.mkdir(parents=True)
        begin(folder)
        # Megatron-Core up to 0.18 writes common.pt on rank 0 alone, where a failure would leave the
        # other ranks waiting: a disk that has no room for it has to be noticed here.
        _room(folder).write_bytes(b"")
        _reserve(_room(folder), 2 * _ROOM_BYTES)
        _reserve(_room(folder), _ROOM_BYTES)

    def _request(
        self, folder: Path, state: dict, content: dict, extra: Callable[[Path], list[str]]
    ) -> AsyncRequest:
        """Megatron-Core's request to write, with our hashing behind the writing, and what is to
        follow on all ranks when everyone has written."""
        request = begin_save(state, folder, content)
        tensors = torch.tensor([_count(request)], device=current_device())
        torch.distributed.all_reduce(tensors)
        size = _ROOM_BYTES + _ROOM_BYTES_A_TENSOR * int(tensors)
        self._together(self.first, lambda: _reserve(_room(folder), size))
        written = self._together(True, lambda: extra(folder))
        rank = torch.distributed.get_rank()
        # Megatron-Core starts no process for a rank that has nothing to write.
        idle = request.async_fn is None
        self._together(idle, lambda: _hash(folder, rank, written))
        return request._replace(
            async_fn=None if idle else partial(
                _write_and_hash, request.async_fn, folder, rank, tuple(written)
            ),
            finalize_fns=[self._make_room(folder), *request.finalize_fns],
        )

    def _make_room(self, folder: Path) -> Callable[[], None]:
        """What the room was kept for comes next: .metadata and the checksums."""
        def unlink() -> None:
            if self.first:
                _room(folder).unlink(missing_ok=True)
        return unlink

    def _finished(self) -> Saved:
        """Written by all; the last step, which makes it a checkpoint."""
        pending, self.pending = self.pending, None
        folder = partial_folder(self.root, pending.iteration)

        def complete() -> Path:
            sums = {}
            for rank in range(torch.distributed.get_world_size()):
                part = read_checksums(folder, _PART.format(rank))
                if part is None:
                    raise OSError(f"{self._rank(rank)} did not finish writing")
                sums |= part
                (folder / _PART.format(rank)).unlink()
            mine = [one.name for one in folder.iterdir() if one.name not in sums]
            for name in mine:  # the tables, and common.pt where there is one, by rank 0
                with (folder / name).open("rb") as file:
                    os.fsync(file.fileno())
                sums[name] = checksum(folder / name)
            write_checksums(folder, sums)
            return publish(self.root, pending.iteration)

        try:
            path = self._together(self.first, complete)
        except SaveError as error:
            self.pending = pending
            return self._failed(error)
        deleted, warning = [], ""
        if self.first and self.limit is not None:
            try:
                deleted = delete_old(self.root, pending.iteration, self.limit, self.held())
            except OSError as error:
                warning = f"older checkpoints could not be deleted: {error}"
        return Saved(
            iteration=pending.iteration, path=path or folder, deleted=tuple(deleted),
            warning=warning, seconds=time.perf_counter() - pending.started,
        )

    def _failed(self, error: Exception) -> Saved:
        pending, self.pending = self.pending, None
        folder = partial_folder(self.root, pending.iteration)
        words = [self._words(error)]  # rank 0 knows of which rank's failure
        if self.first:
            # torch's writer says of a full disk only that it is not where it should be in a file.
            if shutil.disk_usage(self.root).free < 2 * _ROOM_BYTES:
                words = [f"the disk is full ({words[0]})"]
            _clear(folder)
        torch.distributed.broadcast_object_list(words, src=0)
        return Saved(
            iteration=pending.iteration, path=folder, error=words[0],
            seconds=time.perf_counter() - pending.started,
        )

    def _together(self, mine: bool, work: Callable):
        """Do `work` on the ranks whose it is; raises SaveError on all if it fails on one."""
        result, error = None, None
        if mine:
            try:
                result = work()
            except (OSError, ValueError) as failed:
                error = f"{self._rank(torch.distributed.get_rank())}: {failed}"
        errors = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, error)
        for one in errors:
            if one is not None:
                raise SaveError(one)
        return result

    def _rank(self, rank: int) -> str:
        return f"rank {rank} ({self.hosts[rank]})"

    def _words(self, error: Exception) -> str:
        """What happened, of the rank it happened on where that is known."""
        failures = getattr(error, "failures", None)
        if failures:
            rank, (cause, _) = next(iter(failures.items()))
            return f"{self._rank(rank)}: {cause}"
        return str(error).splitlines()[0]


def _write_and_hash(write: Callable, folder: Path, rank: int, written: tuple[str, ...],
                    *args) -> None:
    """In the process that writes: Megatron-Core's writing, then the checksums of these files."""
    write(*args)
    _, buckets, _ = args
    try:
        _hash(folder, rank, [*written, *(name for _, name, _ in buckets)])
    except FileNotFoundError:
        pass  # the writing has failed, and Megatron-Core tells rank 0
    except OSError as error:
        # Nobody listens here. Rank 0 will miss this rank's checksums and let the checkpoint fail.
        print(f"rank {rank} could not hash its part of {folder}: {error}", flush=True)


def _hash(folder: Path, rank: int, names: list[str]) -> None:
    write_checksums(folder, {name: checksum(folder / name) for name in names}, _PART.format(rank))


def _room(folder: Path) -> Path:
    """Beside it: Megatron-Core takes a directory that is not empty for a damaged checkpoint."""
    return folder.with_suffix(".room")


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _room(folder).unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        reserve(file, size)


def _count(request: AsyncRequest) -> int:
    """Tensors and objects that this rank writes."""
    if request.async_fn is None:
        return 0
    _, buckets, _ = request.async_fn_args
    return sum(len(items) + len(tensors) for _, _, (items, tensors) in buckets)
