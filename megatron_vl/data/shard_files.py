"""Files in shards: a sample's headers and JSON, and single media when they are needed.

A sample's tokens and sizes fit a few kilobytes; its images and videos may be many megabytes. What
waits in a shuffle or packing buffer is therefore the sample without its media, and the media of a
row are read only when the row is made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import struct
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.energon import SavableDataset
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from megatron.energon.flavors.webdataset.itar import ITAR_SUFFIX, ITarFile
from megatron.energon.flavors.webdataset.itar_reader import (
    ITarReader,
    ShardInfosITarReader,
    SqliteITarEntryReader,
)
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset
from megatron.energon.flavors.webdataset.structs import FilteredSample
from megatron.energon.rng import WorkerRng
from megatron.energon.source_info import SourceInfo

from megatron_vl.data.media import BadMedia
from megatron_vl.errors import InputError, printable

PLACES = "__places__"  # of a sample read by `LocalShards`: its shard, and where its files are in it
_NOTHING = bytes(167)
_BLOCK = 512  # bytes of a tar header, and of what files are rounded up to
_AT_ONCE = 4096  # bytes of a sample read in one go: its headers and JSON, mostly

Places = tuple[str, dict[str, tuple[int, int]]]  # a shard; offset and size of files by extension


class ShardFiles:
    """Files by dataset, sample key and extension; the shards stay open.

    energon's own store opens the shard anew for every file, two milliseconds on a local disk.
    """

    def __init__(self, max_open: int = 64):
        """`max_open`: files kept open by one process; `expect` asks for more."""
        self.max_open = max_open
        self._forget()

    def expect(self, count: int) -> None:
        """So many files will be read in turn, for all of the limit on a process' open files."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = limit // 4 if limit != resource.RLIM_INFINITY else count
        self.max_open = max(self.max_open, min(count, most))

    def reader(
        self, dataset: EPath, key: str, places: Places | None = None
    ) -> Callable[[str], bytes]:
        """What reads a file of one sample by its extension, such as "0.jpg".

        Args:
            places: where they are; None: energon's index of the shards knows.
        """
        return partial(self.read, dataset, key, places)

    def read(self, dataset: EPath, key: str, places: Places | None, extension: str) -> bytes:
        """The bytes of `KEY.extension`.

        Raises:
            BadMedia: it is not there, or cannot be read.
        """
        if places is not None:
            shard, files = places
            if extension not in files:
                raise BadMedia(f"its file {key}.{extension} is not in its shard")
            offset, size = files[extension]
        else:
            index = self._index(dataset)
            try:
                place = index.sqlite_reader.get_sample_part(key, extension)
            except KeyError as error:
                raise BadMedia(
                    f"its file {key}.{extension} is not in the dataset's index"
                ) from error
            path = index.tar_filepaths[place.tar_file_id]
            if not path.is_local():
                return index[f"{key}.{extension}"][0]
            shard, offset, size = str(path), place.raw_byte_offset, place.raw_byte_size
        try:
            data = self.pread(shard, size, offset)
        except (OSError, OverflowError, TypeError) as error:
            raise BadMedia(f"its file {key}.{extension} cannot be read ({error})") from error
        if len(data) != size:
            raise BadMedia(f"the shard {shard} ends within its file {key}.{extension}")
        return data

    def pread(self, path: str, size: int, offset: int) -> bytes:
        """At most `size` bytes of a file from `offset` on. Raises OSError, OverflowError."""
        file = self._descriptor(path)
        if size > _AT_ONCE:
            # Room is made before it is read, and an index or a header may ask for any.
            size = min(size, os.fstat(file).st_size - offset)
        return os.pread(file, max(0, size), offset)

    def _index(self, dataset: EPath) -> SqliteITarEntryReader:
        self._check_process()
        name = str(dataset)
        if name not in self._indices:
            self._indices[name] = SqliteITarEntryReader(dataset, key_is_full_entryname=True)
        return self._indices[name]

    def _descriptor(self, path: str) -> int:
        self._check_process()
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= self.max_open:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest)
        self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]

    def _check_process(self) -> None:
        """A fork must not share a database connection with its parent."""
        if os.getpid() != self._process:
            self._forget()

    def __del__(self) -> None:
        if os.getpid() == self._process:  # a child's numbers may be other files by now
            for file in self._open.values():
                with contextlib.suppress(OSError):
                    os.close(file)

    def _forget(self) -> None:
        self._process = os.getpid()
        self._indices: dict[str, SqliteITarEntryReader] = {}
        self._open: OrderedDict[str, int] = OrderedDict()


class LocalShards(ShardInfosITarReader):
    """energon's reader of a dataset's samples, for shards on a local disk.

    energon reads them through Python's tarfile, which makes an object of every header, and through
    multistorageclient, which records metrics of every access: half of what reading and tokenising a
    short sample costs. This one reads headers as bytes, and notes where the files are that are not
    read yet. What is no plain file with a short name, or damaged, is left to energon.
    """

    def __init__(self, reader: ShardInfosITarReader, files: ShardFiles):
        """Reads as `reader` does."""
        super().__init__(
            reader.base_path, reader.shard_infos, part_filter=reader.part_filter,
            itar_cache_size=reader.itar_cache_size, sample_filter=reader.sample_filter,
        )
        self.files = files
        self._tars = [str(path) for path in self.tar_filepaths]
        self._indices = [str(path.with_suffix(ITAR_SUFFIX)) for path in self.tar_filepaths]

    def __getitem__(self, idx: int) -> FilteredSample | None:
        """The sample; None if it is excluded.

        Raises:
            InputError: it cannot be read.
            IndexError: there is no such sample.
        """
        try:
            return self._sample(idx)
        except (_NotPlain, OSError, OverflowError):
            pass
        number = self._shard_of(idx)
        try:
            return super().__getitem__(idx)
        except (tarfile.TarError, ValueError, LookupError, TypeError, OverflowError,
                OSError) as error:
            mend = "copy the shard again, or prepare the dataset again with `megatron-vl prepare`"
            if isinstance(error, OSError):
                mend = "see that the disk is there and the file may be read"
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    mend = "raise the limit on open files (`ulimit -n`)"
            raise InputError(
                f"sample {idx - self.shard_count_cumsum[number]} (from 0) of the shard "
                f"{self._tars[self.shard_tar_file_idxs[number]]} cannot be read "
                f"({printable(str(error)) or type(error).__name__}); {mend}."
            ) from error

    def _shard_of(self, idx: int) -> int:
        """Raises IndexError: there is no such sample."""
        if not 0 <= idx < len(self):
            raise IndexError(f"there is no sample {idx} among {len(self)}")
        return bisect_right(self.shard_count_cumsum, idx) - 1

    def _sample(self, idx: int) -> FilteredSample | None:
        """As `__getitem__`. Raises _NotPlain, OSError, OverflowError: energon has to read it."""
        number = self._shard_of(idx)
        tar = self.shard_tar_file_idxs[number]
        shard_name, shard = self.tar_filenames[tar], self._tars[tar]
        entry = 8 * (idx - self.shard_count_cumsum[number])
        place = self.files.pread(self._indices[tar], 16, entry)
        if len(place) < 16:
            raise _NotPlain
        key, parts, names, places = None, {}, [], {}
        for name, offset, size, data in self._members(shard, *struct.unpack("QQ", place)):
            match = None if skip_meta_re.match(name) else split_name_re.match(name)
            base, extension = match.groups() if match is not None else (None, "__")
            if extension.startswith("__"):  # would be taken for what energon adds to a sample
                raise _NotPlain
            if key is None:
                key = base
                if self.sample_filter is not None and not self.sample_filter(f"{shard_name}/{key}"):
                    return None
            elif key != base:
                raise _NotPlain
            places[extension] = offset, size
            if self.part_filter is None or self.part_filter(extension):
                parts[extension] = data or self.files.pread(shard, size, offset)
                names.append(name)
                if len(parts[extension]) != size:
                    raise _NotPlain
        if key is None:
            raise _NotPlain
        return FilteredSample(
            __key__=key,
            __shard__=shard_name,
            __restore_key__=("Webdataset", idx),
            __sources__=(SourceInfo(dataset_path=self.base_path, index=idx, shard_name=shard_name,
                                    file_names=tuple(names)),),
            **{PLACES: (shard, places)},
            **parts,
        )

    def _get_itarfile_cached(self, tar_file_id: int) -> ITarFile:
        if tar_file_id not in self.itar_files_cache:
            self.itar_files_cache[tar_file_id] = _OnwardTar.open(
                fileobj=self.tar_filepaths[tar_file_id].open("rb"), mode="r:"
            )
        return super()._get_itarfile_cached(tar_file_id)  # closes one that is too many

    def _members(
        self, shard: str, begin: int, end: int
    ) -> Iterator[tuple[str, int, int, bytes]]:
        """Name, offset, size of the files in a stretch of a shard, and their bytes if at hand.

        Raises _NotPlain: there is something else, or a file that does not end within the stretch.
        """
        ahead = self.files.pread(shard, min(end - begin, _AT_ONCE), begin)
        at = begin
        while at < end:
            block = ahead[at - begin : at - begin + _BLOCK]
            if len(block) < _BLOCK:
                block = self.files.pread(shard, _BLOCK, at)
            name, size = _plain_file(block)
            offset = at + _BLOCK
            data = ahead[offset - begin : offset - begin + size]
            if offset + size > end:
                raise _NotPlain
            yield name, offset, size, data if len(data) == size else b""
            at = offset + -(-size // _BLOCK) * _BLOCK


class _OnwardTar(ITarFile):
    """A tar file that is not read in circles, as one is with a file of a size below zero."""

    def next(self) -> tarfile.TarInfo | None:
        begin = self.offset
        found = super().next()
        if found is not None and self.offset <= begin:
            raise tarfile.ReadError("a file of a size below zero")
        return found


class _NotPlain(Exception):
    """What energon and tarfile know better how to read."""


def _plain_file(block: bytes) -> tuple[str, int]:
    """Name and size of a file in a tar header (POSIX.1-1988 ustar).

    Raises _NotPlain: no file's, a name longer than the first field, or a header that is damaged.
    """
    # No link, and neither a second half of the name nor anything after it: zeros.
    if (block[156:157], block[157:257], block[257:262], block[345:]) != (
        b"0", _NOTHING[:100], b"ustar", _NOTHING
    ):
        raise _NotPlain
    name, size, checksum = (
        block[begin:end].partition(b"\0")[0] for begin, end in ((0, 100), (124, 136), (148, 156))
    )
    try:
        name, size, checksum = name.decode("utf-8"), int(size, 8), int(checksum, 8)
    except ValueError as error:
        raise _NotPlain from error
    told = block[:148] + block[156:157] + block[257:345]
    if size < 0 or checksum != sum(told) + 8 * ord(" "):
        raise _NotPlain
    return name, size


class SliceRng(WorkerRng):
    """energon's random numbers, draw for draw; which slice is read next costs a fifth.

    The slices at hand change once in hundreds of samples; energon adds up their sizes for each.
    """

    _probs: torch.Tensor | None = None
    _sums: tuple[int, list[float]] = (-1, [])  # of this version of `_probs`

    def choice_idx(self, probs: torch.Tensor) -> int:
        """A place in `probs`, float32, drawn by its share of their sum."""
        if len(probs) == 1:
            return 0
        if probs.is_inference():  # without a version
            return super().choice_idx(probs)
        if probs is not self._probs or probs._version != self._sums[0]:
            self._probs, self._sums = probs, (probs._version, torch.cumsum(probs, 0).tolist())
        sums = self._sums[1]
        drawn = np.float32(torch.rand(1, generator=self.rng).item()) * np.float32(sums[-1])
        return bisect_right(sums, float(drawn))


class TarReaders:
    """energon's readers at the ends of a chain of datasets, made fast, and made to forget.

    Where energon's own stay, Python's tarfile remembers every header it reads, and energon keeps
    its shards open: about one kilobyte a sample, for ever.
    """

    def __init__(self, dataset: SavableDataset, files: ShardFiles):
        self.readers: list[ITarReader] = []
        open_files = 0
        for end in _ends(dataset):
            end.join_readers = [_quick(reader, files) for reader in end.join_readers]
            self.readers += end.join_readers
            open_files += sum(2 * reader.itar_cache_size for reader in end.join_readers)
            if isinstance(end, WebdatasetSampleLoaderDataset):
                # A dataset that is set back has energon's own again: slower, the same draws.
                end._worker_rng = SliceRng(end.worker_config)
        files.expect(files.max_open + open_files)  # shards and indices, beside those of media

    def forget(self) -> None:
        for reader in self.readers:
            for tar in reader.itar_files_cache.values():
                tar.members.clear()


def _quick(reader: ITarReader, files: ShardFiles) -> ITarReader:
    if type(reader) is ShardInfosITarReader and all(p.is_local() for p in reader.tar_filepaths):
        reader = LocalShards(reader, files)
    # Local shards opened by multistorageclient record four metrics a sample.
    reader.tar_filepaths = [_plain(path) for path in reader.tar_filepaths]
    return reader


def _plain(path: EPath | Path) -> EPath | Path:
    return Path(str(path)) if isinstance(path, EPath) and path.is_local() else path


def _ends(dataset) -> Iterator[SavableDataset]:
    """The datasets of a chain that read shards."""
    if hasattr(dataset, "join_readers"):
        yield dataset
    inner = getattr(dataset, "datasets", None)
    for one in (getattr(dataset, "dataset", None),) if inner is None else inner:
        if one is not None:
            yield from _ends(one)
