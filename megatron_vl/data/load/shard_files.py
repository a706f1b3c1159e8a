"""Samples of shards without their media, and single media when they are needed.

A sample's tokens and sizes fit a few kilobytes; its images and videos may be many megabytes. What
waits in a shuffle or packing buffer is therefore the sample without its media, and the media of a
row are read only when the row is made, from where energon's reader passed them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from megatron.energon import SavableDataset
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar import ITarFile, ITarSamplePointer
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.structs import FilteredSample

from megatron_vl.errors import InputError, printable
from megatron_vl.models.media import BadMedia

PLACES = "__places__"  # of a sample read by `SampleReader`: where its files are

Places = tuple[EPath | Path, dict[str, tuple[int, int]]]  # a shard; offset, size by extension


class ShardFiles:
    """Single files of samples; the shards on a local disk stay open.

    energon's own store opens the shard anew for every file, two milliseconds on a local disk.
    """

    def __init__(self, max_open: int = 64):
        """`max_open`: shards that are kept open."""
        self.max_open = max_open
        self._open: OrderedDict[Path, int] = OrderedDict()

    def reader(self, key: str, places: Places) -> Callable[[str], bytes]:
        """What reads a file of the sample `key` by its extension, such as "0.jpg"."""
        return partial(self.read, key, places)

    def read(self, key: str, places: Places, extension: str) -> bytes:
        """The bytes of `KEY.extension`.

        Raises:
            BadMedia: it is not there, or cannot be read.
        """
        shard, files = places
        if extension not in files:
            raise BadMedia(f"its file {key}.{extension} is not in its shard")
        offset, size = files[extension]
        try:
            data = self._read(shard, size, offset)
        except (OSError, OverflowError) as error:
            raise BadMedia(f"its file {key}.{extension} cannot be read ({error})") from error
        if len(data) != size:
            raise BadMedia(f"the shard {shard} ends within its file {key}.{extension}")
        return data

    def _read(self, shard: EPath | Path, size: int, offset: int) -> bytes:
        """At most `size` bytes from `offset` on. Raises OSError, OverflowError."""
        if isinstance(shard, EPath):
            with shard.open("rb") as file:
                file.seek(offset)
                return file.read(min(size, shard.size() - offset))
        file = self._descriptor(shard)
        # Room is made before it is read, and a header may ask for any.
        return os.pread(file, max(0, min(size, os.fstat(file).st_size - offset)), offset)

    def _descriptor(self, shard: Path) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self.max_open:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest)
        self._open[shard] = os.open(shard, os.O_RDONLY)
        return self._open[shard]

    def __del__(self) -> None:
        for file in self._open.values():
            with contextlib.suppress(OSError):
                os.close(file)


class SampleReader(ShardInfosITarReader):
    """energon's reader of a dataset's samples, which also notes where the files are.

    What cannot be read is named in one sentence.
    """

    def __init__(self, reader: ShardInfosITarReader, *, most_open: int = sys.maxsize):
        """Reads as `reader` does, with at most so many shards open, and as many indices."""
        super().__init__(
            reader.base_path, reader.shard_infos, part_filter=reader.part_filter,
            itar_cache_size=min(reader.itar_cache_size, most_open),
            sample_filter=reader.sample_filter,
        )
        # Local shards opened by multistorageclient record four metrics a sample.
        self.tar_filepaths = [
            Path(str(path)) if path.is_local() else path for path in self.tar_filepaths
        ]

    def __getitem__(self, idx: int) -> FilteredSample | None:
        """The sample; None if it is excluded.

        Raises:
            InputError: it cannot be read.
            IndexError: there is no such sample.
        """
        if not 0 <= idx < len(self):
            raise IndexError(f"there is no sample {idx} among {len(self)}")
        try:
            return super().__getitem__(idx)
        except (tarfile.TarError, ValueError, LookupError, TypeError, OverflowError,
                OSError) as error:
            mend = "copy the shard again, or prepare the dataset again with `megatron-vl prepare`"
            if isinstance(error, OSError):
                mend = "see that the disk is there and the file may be read"
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    mend = "raise the limit on open files (`ulimit -n`)"
            number = bisect_right(self.shard_count_cumsum, idx) - 1
            raise InputError(
                f"sample {idx - self.shard_count_cumsum[number]} (from 0) of the shard "
                f"{self.shard_infos[number].path} cannot be read "
                f"({printable(str(error)) or type(error).__name__}); {mend}."
            ) from error

    def _get_item_by_sample_pointer(
        self, sample_pointer: ITarSamplePointer, *args, **more
    ) -> FilteredSample | None:
        number = sample_pointer.tar_file_id
        if number not in self.itar_files_cache:
            self.itar_files_cache[number] = _OnwardTar.open(
                fileobj=self.tar_filepaths[number].open("rb"), mode="r:"
            )
        passed = self.itar_files_cache[number].members
        passed.clear()  # else tarfile keeps every header: a kilobyte a sample, for ever
        sample = super()._get_item_by_sample_pointer(sample_pointer, *args, **more)
        if sample is not None:
            begin = len(sample["__key__"]) + 1
            files = {file.name[begin:]: (file.offset_data, file.size) for file in passed}
            sample[PLACES] = self.tar_filepaths[number], files
        return sample


class _OnwardTar(ITarFile):
    """A tar file that is not read in circles, as one is with a file of a size below zero."""

    def next(self) -> tarfile.TarInfo | None:
        begin = self.offset
        found = super().next()
        if found is not None and self.offset <= begin:
            raise tarfile.ReadError("a file of a size below zero")
        return found


def note_places(dataset: SavableDataset) -> None:
    """Have the readers at the ends of a chain of datasets note where their samples' files are.

    Together they keep half of the files open that a process may, however many datasets there are.
    """
    ends = list(_ends(dataset))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    each = sys.maxsize if limit == resource.RLIM_INFINITY else max(1, limit // 4 // len(ends))
    for end in ends:
        end.join_readers = [
            SampleReader(one, most_open=each) if type(one) is ShardInfosITarReader else one
            for one in end.join_readers
        ]


def _ends(dataset) -> Iterator[SavableDataset]:
    """The datasets of a chain that read shards."""
    if hasattr(dataset, "join_readers"):
        yield dataset
    inner = getattr(dataset, "datasets", None)
    for one in (getattr(dataset, "dataset", None),) if inner is None else inner:
        if one is not None:
            yield from _ends(one)
