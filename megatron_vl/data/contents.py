"""Which samples a prepared dataset holds, so that a run goes on with those it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from megatron_vl.errors import InputError
from megatron_vl.typed import Text, read_file

DIGESTS = "digests.json"  # of .nv-meta: every shard's SHA-256, by its name


class Digested:
    """A file that is written from its beginning to its end, and its SHA-256."""

    def __init__(self, file: BinaryIO):
        self._file, self._sum = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._sum.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    @property
    def digest(self) -> str:
        return self._sum.hexdigest()


def note_digests(dataset: Path, digests: Mapping[str, str]) -> None:
    """Write down the digests of a dataset's shards as they were written."""
    (dataset / ".nv-meta" / DIGESTS).write_text(json.dumps(digests, indent=0), encoding="utf-8")


def contents_of(dataset: Path, shards: Sequence[str]) -> dict[str, str | None]:
    """What tells the samples of a checked dataset's shards from others, wherever it lies.

    No sample is read: `index` is of the shards' sizes and where each sample begins in them,
    `digests` of their bytes as `megatron-vl prepare` noted them, None where it did not.

    Raises:
        InputError: a shard or an index is missing, or the digests are damaged.
    """
    index = hashlib.sha256()
    for name in shards:
        shard = Path(dataset) / name
        try:
            index.update(f"{name} {shard.stat().st_size} ".encode())
            index.update(shard.with_suffix(".tar.idx").read_bytes())
        except OSError as error:
            raise InputError(
                f"{error.filename} is missing or unreadable; restore it, or prepare the dataset "
                f"again with `megatron-vl prepare`."
            ) from error
    noted = Path(dataset) / ".nv-meta" / DIGESTS
    known = {}
    if noted.is_file():
        known = read_file(noted, dict[Text, Text], mend="prepare the dataset again, or remove it")
    digests = [known.get(name) for name in shards]
    return {
        "index": index.hexdigest()[:16],
        "digests": None if None in digests else (
            hashlib.sha256(repr(digests).encode()).hexdigest()[:16]
        ),
    }
