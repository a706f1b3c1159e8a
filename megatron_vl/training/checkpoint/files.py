"""A run's checkpoints as files: which there are, whether they are whole, which are let go.

SAVE/
    latest_checkpointed_iteration.txt    the iteration to go on from; may be edited by hand
    best_checkpoint.json                 the best one by its validation: see `best`
    iter_0000100/                        named so when all of it is there
        SHA256SUMS                       of its files; `sha256sum -c SHA256SUMS` checks them too
    .iter_0000110.partial/               being written, or left by a run that was ended meanwhile
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from megatron_vl.weights.found import LATEST, RELEASE, iterations, latest

SUMS = "SHA256SUMS"
LOADER = "loader_dp{}.json"  # where each data-parallel rank stood in its data
_BLOCK = 2**22  # bytes read at once
_SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def folder(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def partial_folder(root: Path, iteration: int) -> Path:
    return root / f".iter_{iteration:07d}.partial"


def candidates(root: Path) -> list[Path]:
    """What may be gone on from: the checkpoint that the file says, then the earlier ones.

    Without that file, as when the very first checkpoint's run was ended before writing it, all from
    the newest on. Empty if `root` holds none.

    Raises:
        InputError: the file says none that is there.
    """
    there = iterations(root)
    if not (root / LATEST).is_file():
        return [folder(root, one) for one in reversed(there)]
    says = latest(root)
    if says is None:
        return [root / RELEASE]
    return [folder(root, one) for one in sorted({*there, says}, reverse=True) if one <= says]


def publish(root: Path, iteration: int) -> Path:
    """Give a partial checkpoint its name and say that it is the latest; returns its path.

    Whenever the process or the machine ends meanwhile, LATEST says a complete one.
    """
    partial, final = partial_folder(root, iteration), folder(root, iteration)
    _sync(partial)
    replaced = None
    if final.exists():  # damaged, or of a run that went further and was set back by hand
        _point(root, max((one for one in iterations(root) if one < iteration), default=None))
        replaced = _hide(final)
    partial.rename(final)
    _sync(root)
    _point(root, iteration)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)  # the next start removes what is left
    return final


def _point(root: Path, iteration: int | None) -> None:
    """Say which checkpoint to go on from; None: whichever is there."""
    if iteration is None:
        (root / LATEST).unlink(missing_ok=True)
        _sync(root)
    else:
        write_whole(root / LATEST, f"{iteration}\n")


def write_whole(path: Path, text: str) -> None:
    """Replace a small file, such that a power cut leaves the old one or the new one."""
    pending = path.with_name(f".{path.name}.partial")
    with pending.open("w", encoding="utf-8") as file:
        file.write(text)
        _flush(file)
    os.replace(pending, path)
    _sync(path.parent)


def delete_old(root: Path, iteration: int, limit: int, held: Container[str] = ()) -> list[int]:
    """Delete all but the `limit` newest checkpoints up to `iteration`, and those whose names are
    `held`; returns those deleted."""
    old = [one for one in iterations(root) if one <= iteration][:-limit]
    old = [one for one in old if folder(root, one).name not in held]
    for one in old:
        shutil.rmtree(_hide(folder(root, one)))
    return old


def _hide(checkpoint: Path) -> Path:
    """Rename what is to be deleted, for it must not look complete; returns the new name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    return doomed


def _sync(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())


# ---- checksums --------------------------------------------------------------------------------


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def write_checksums(checkpoint: Path, sums: Mapping[str, str], name: str = SUMS) -> None:
    """{file: checksum} in the form of `sha256sum`."""
    with (checkpoint / name).open("w", encoding="utf-8") as file:
        file.writelines(f"{value}  {of}\n" for of, value in sorted(sums.items()))
        _flush(file)


def read_checksums(checkpoint: Path, name: str = SUMS) -> dict[str, str] | None:
    """{file: checksum}; None where there are none, as in checkpoints of other tools.

    Raises:
        ValueError: the file is damaged itself.
    """
    path = checkpoint / name
    if not path.is_file():
        return None
    sums = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _SUM.fullmatch(line)
        if match is None or Path(match[2]).name != match[2]:
            raise ValueError(f"{name} is damaged")
        sums[match[2]] = match[1]
    return sums


def faults(checkpoint: Path, sums: Mapping[str, str], files: Sequence[str]) -> list[str]:
    """What is wrong with some of a checkpoint's files, a phrase each."""
    found = []
    for name in files:
        try:
            right = checksum(checkpoint / name) == sums[name]
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
        else:
            found += [] if right else [f"{name} is not what was written"]
    return found
