"""Files in shards: single ones, read when they are needed; and what energon keeps of them all.

A sample's tokens and sizes fit a few kilobytes; its images and videos may be many megabytes. What
waits in a shuffle or packing buffer is therefore the sample without its media, and the media of a
row are read only when the row is made.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from megatron.energon import SavableDataset
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar_reader import ITarReader, SqliteITarEntryReader

from megatron_vl.data.media import BadMedia


class ShardFiles:
    """Files by dataset, sample key and extension, through energon's index of the shards.

    energon's own store opens the shard anew for every file, two milliseconds on a local disk. This
    one keeps the shards' descriptors and reads at an offset.
    """

    def __init__(self, max_open: int = 64):
        """`max_open`: shards kept open by one process."""
        self.max_open = max_open
        self._forget()

    def reader(self, dataset: EPath, key: str) -> Callable[[str], bytes]:
        """What reads a file of one sample by its extension, such as "0.jpg"."""
        return partial(self.read, dataset, key)

    def read(self, dataset: EPath, key: str, extension: str) -> bytes:
        """The bytes of `KEY.extension`.

        Raises:
            BadMedia: the index or the shard does not have it.
        """
        if os.getpid() != self._process:
            self._forget()  # a fork must not share a database connection with its parent
        index = self._indices.get(str(dataset))
        if index is None:
            index = SqliteITarEntryReader(dataset, key_is_full_entryname=True)
            self._indices[str(dataset)] = index
        try:
            place = index.sqlite_reader.get_sample_part(key, extension)
        except KeyError as error:
            raise BadMedia(f"its file {key}.{extension} is not in the dataset's index") from error
        shard = index.tar_filepaths[place.tar_file_id]
        if not shard.is_local():
            return index[f"{key}.{extension}"][0]
        try:
            file = self._descriptor(str(shard))
            # pread makes room before it reads: an index may ask for any.
            left = os.fstat(file).st_size - place.raw_byte_offset
            size = max(0, min(place.raw_byte_size, left))
            data = os.pread(file, size, place.raw_byte_offset)
        except (OSError, OverflowError, TypeError) as error:
            raise BadMedia(f"its file {key}.{extension} cannot be read ({error})") from error
        if len(data) != place.raw_byte_size:
            raise BadMedia(f"the shard {shard} ends within its file {key}.{extension}")
        return data

    def _descriptor(self, path: str) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= self.max_open:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest)
        self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]

    def _forget(self) -> None:
        self._process = os.getpid()
        self._indices: dict[str, SqliteITarEntryReader] = {}
        self._open: OrderedDict[str, int] = OrderedDict()


class TarReaders:
    """energon's readers of shards, without what they would count and remember for nobody.

    Python's tarfile remembers every header it reads, and energon keeps its shards open: about one
    kilobyte a sample, for ever. And local shards, opened by multistorageclient, record four metrics
    a sample.
    """

    def __init__(self, dataset: SavableDataset):
        self.readers = list(_tar_readers(dataset))
        for reader in self.readers:
            reader.tar_filepaths = [_plain(path) for path in reader.tar_filepaths]

    def forget(self) -> None:
        for reader in self.readers:
            for tar in reader.itar_files_cache.values():
                tar.members.clear()


def _plain(path: EPath | Path) -> EPath | Path:
    return Path(str(path)) if isinstance(path, EPath) and path.is_local() else path


def _tar_readers(dataset) -> Iterator[ITarReader]:
    """Those at the ends of energon's chain of datasets."""
    yield from getattr(dataset, "join_readers", ())
    inner = getattr(dataset, "datasets", None)
    for one in (getattr(dataset, "dataset", None),) if inner is None else inner:
        if one is not None:
            yield from _tar_readers(one)
