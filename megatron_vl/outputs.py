"""What a command writes: what it may replace, and how it takes its place at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_vl.errors import InputError

_HOST = socket.gethostname()


def check_target(
    target: Path, *, overwrite: bool, needed: Iterable[Path],
    is_ours: Callable[[Path], bool], what: str,
) -> None:
    """Whether `target` may be written; what killed runs left of it is mended first.

    Args:
        needed: files and directories that must not be deleted with a target that is overwritten.
        is_ours: whether a directory holds what the command writes; nothing else is overwritten.
        what: the name of that.

    Raises:
        InputError: it exists and may not, or cannot, be replaced.
    """
    _mend(target)
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file; give a directory.")
    try:
        empty = not any(target.iterdir())
        replaceable = empty or is_ours(target)
    except OSError:  # what cannot be looked at cannot be replaced either
        empty = replaceable = False
    if not overwrite and not empty:
        raise InputError(
            f"{target} exists and is not empty; choose another directory, or give --overwrite to "
            f"replace it."
        )
    for path in needed:
        if _holds(target.resolve(), path):
            raise InputError(
                f"{target} holds {path}, which is in use; choose another directory."
            )
    if not replaceable:
        raise InputError(
            f"{target} holds no {what}, so --overwrite leaves it alone; remove it yourself, or "
            f"choose another directory."
        )


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new directory beside `target` that takes its place when the block ends without an error.

    Until then `target` is untouched; on an error, or when it is told to end by SIGTERM, nothing is
    left behind. Of a run that is killed `check_target` clears away what is left; a target it had
    moved aside comes back.

    Raises:
        InputError: something cannot be read or written, in the block too.
    """
    target = target.resolve()
    partial, replaced = (_beside(target, kind, os.getpid()) for kind in ("partial", "replaced"))
    with _clearing_away_on_sigterm():
        yield from _replacing(target, partial, replaced)


def _replacing(target: Path, partial: Path, replaced: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        try:
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
        except BaseException:  # a signal comes at any line
            if replaced.exists():
                replaced.rename(partial if target.exists() else target)
            raise
        if replaced.exists():
            # So that a `.replaced-` directory is always whole, however far its removal came.
            replaced.rename(partial)
    except OSError as error:
        raise InputError(
            f"{target} cannot be written ({error}); free space, check the permissions, or choose "
            f"another directory."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _clearing_away_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does, where nobody else listens to it."""
    if (threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL):
        yield
        return

    process = os.getpid()

    def end(number, frame):
        if os.getpid() != process:  # one that was forked since
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def with_suffix(path: str | Path, suffixes: Sequence[str], option: str) -> Path:
    """`path` as a file of a kind; without a suffix it gets the first of `suffixes`.

    Raises:
        InputError: it has another one, or is a directory.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{option} {path} is a directory; give a file.")
    if not path.suffix:
        return path.with_name(path.name + suffixes[0])
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{option} {path} ends in {path.suffix}; give a {' or '.join(suffixes)}.")
    return path


def check_writable(folder: Path, what: str) -> None:
    """Whether files can be made in `folder`, which need not be there yet; makes nothing.

    Args:
        what: the option that names it, and its value.

    Raises:
        InputError: they cannot.
    """
    folder = folder.absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "may not be written to" if there.is_dir() else "is a file"
        raise InputError(f"{what} cannot be made: {there} {why}; give another.")


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A new file beside `path`, with its suffix, that replaces it when the block ends.

    Until then `path` is untouched; on an error nothing is left behind.

    Raises:
        InputError: `path` is a directory, or something cannot be read or written.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a file.")
    pending = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix
        )
        os.close(handle)
        pending = Path(name)
        yield pending
        pending.chmod(0o644)
        os.replace(pending, path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error}); free space, check the permissions, or give "
            f"another file."
        ) from error
    finally:
        if pending is not None:
            pending.unlink(missing_ok=True)


def _mend(target: Path) -> None:
    """Removes what killed runs of this machine left beside `target`, or puts it back."""
    target = target.resolve()
    try:
        beside = sorted(target.parent.iterdir())
    except OSError:  # a directory that cannot be read is told where it is written
        return
    for kind in ("replaced", "partial"):
        prefix = _beside(target, kind, "").name
        for left in beside:
            pid = left.name.removeprefix(prefix)
            if not left.name.startswith(prefix) or not pid.isdigit() or _is_other(int(pid)):
                continue
            if kind == "replaced" and not target.exists():
                left.rename(target)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _holds(target: Path, path: Path) -> bool:
    """Whether `path` is `target` or in it, by its name or by where a link leads."""
    named, real = path.parent.resolve() / path.name, path.resolve()
    return any(one.is_relative_to(target) for one in (named, real))


def _beside(target: Path, kind: str, pid: int | str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{_HOST}-{pid}")


def _is_other(pid: int) -> bool:
    """Whether another process of this machine that still lives has this id."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is someone else's
        return True
    return True
