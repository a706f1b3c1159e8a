"""The directory `prepare` writes: what it may replace, and how it takes its place."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_vl.errors import InputError

_HOST = socket.gethostname()


def check_output(output: Path, *, overwrite: bool, needed: Sequence[Path]) -> None:
    """Whether a dataset may be written to `output`.

    Args:
        needed: what must not be deleted with an output that is overwritten.

    Raises:
        InputError: it exists and may not, or cannot, be replaced.
    """
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise InputError(f"{output} is a file; give a directory that is to be made.")
    if not overwrite:
        raise InputError(
            f"{output} exists already; choose another directory, or give --overwrite to replace it."
        )
    place = _real(output)
    for path in needed:
        if _real(path).is_relative_to(place):
            raise InputError(
                f"overwriting {output} would delete {path}, which is in use; choose another "
                f"directory."
            )
    try:
        replaceable = (output / ".nv-meta").is_dir() or not any(output.iterdir())
    except OSError:  # what cannot be looked at cannot be replaced either
        replaceable = False
    if not replaceable:
        raise InputError(
            f"{output} holds no prepared dataset (no .nv-meta), so --overwrite leaves it alone; "
            f"remove it yourself, or choose another directory."
        )


@contextlib.contextmanager
def new_dataset(output: Path) -> Iterator[Path]:
    """An empty directory beside `output` that takes its place if the block ends without an error.

    Until then an old `output` is untouched; on an error nothing is left behind.

    Raises:
        InputError: something cannot be read or written, in the block too.
    """
    output = _real(output)
    partial = _beside(output, "partial", os.getpid())
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if output.exists():
            output.rename(_beside(output, "replaced", os.getpid()))
        partial.rename(output)
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error}); check the permissions and the disk space, or "
            f"choose another directory."
        ) from error
    finally:
        clear_beside(output)


def clear_beside(output: Path) -> None:
    """Remove what this run, and killed runs of this machine, left beside `output`.

    An old dataset that was moved aside goes back if no new one took its place.
    """
    output = _real(output)
    with contextlib.suppress(OSError):  # an unreadable directory is told where it is written
        for left in sorted(output.parent.iterdir()):
            for kind in ("partial", "replaced"):
                prefix = _beside(output, kind, "").name
                pid = left.name.removeprefix(prefix)
                if not left.name.startswith(prefix) or not pid.isdigit() or _is_other(int(pid)):
                    continue
                if kind == "replaced" and not output.exists():
                    left.rename(output)
                else:
                    shutil.rmtree(left, ignore_errors=True)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _beside(output: Path, kind: str, pid: int | str) -> Path:
    return output.with_name(f".{output.name}.{kind}-{_HOST}-{pid}")


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
