"""energon's index of shards, written while they are.

It is what `energon prepare` writes, with energon's own tables; that would read every shard again,
and decode every image, for what is known here.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml
from megatron.energon import __version__
from megatron.energon.bracecollapse import collapse
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset import config as names
from megatron.energon.flavors.webdataset.indexing import SqliteIndexWriter
from megatron.energon.flavors.webdataset.itar import ITAR_SUFFIX
from megatron.energon.flavors.webdataset.prepare import (
    IndexMediaMetadata,
    IndexSample,
    IndexSamplePart,
)
from megatron.energon.flavors.webdataset.structs import WebdatasetInfo, WebdatasetSplits
from megatron.energon.media.extractor import MediaFilterConfig
from megatron.energon.typed_converter import to_json_object

_MEDIA = MediaFilterConfig.parse(None, False, True)  # `--media-metadata-by-extension`
_TYPES = {True: "image", False: "av"}


class IndexedFile(NamedTuple):
    """One file of a sample in a shard."""

    extension: str
    offset: int  # of its bytes in the shard
    size: int
    metadata: str | None = None  # JSON of a medium's sizes
    is_image: bool = True


class ShardIndex:
    """The index of a dataset's shards; used as a context, in which shards are added in turn.

    Raises:
        OSError: something cannot be written.
    """

    def __init__(self, dataset: Path):
        self._dataset = dataset
        self._folder = dataset / names.MAIN_FOLDER_NAME
        self._counts: dict[str, int] = {}
        self._samples: list[IndexSample] = []
        self._parts: list[IndexSamplePart] = []
        self._media: list[IndexMediaMetadata] = []

    def __enter__(self) -> ShardIndex:
        self._folder.mkdir()
        with _as_os_errors():
            self._tables = SqliteIndexWriter(
                EPath(self._folder / names.INDEX_SQLITE_FILENAME), enable_media_metadata=True
            )
        return self

    def __exit__(self, kind, error, trace) -> None:
        with _as_os_errors():
            if kind is None:
                self._flush()
                self._tables.append_media_filter(strategy=_MEDIA.strategy.value, patterns="")
                self._tables.close()
            elif self._tables.db is not None:
                self._tables.db.close()

    @contextmanager
    def shard(self, name: str) -> Iterator[Shard]:
        """The shard `name`, which is there and being written."""
        shard = Shard(self, len(self._counts))
        yield shard
        # energon's own writer records metrics of each number: a tenth of what all of it takes.
        offsets = array("Q", [*shard.begins, shard.end])
        (self._dataset / name).with_suffix(ITAR_SUFFIX).write_bytes(offsets.tobytes())
        self._counts[name] = len(shard.begins)

    def add(
        self, shard: int, number: int, key: str, begin: int, end: int, files: Iterable[IndexedFile]
    ) -> None:
        """Sample `number` of a shard, which is there from byte `begin` to byte `end`."""
        self._samples.append(IndexSample(
            tar_file_id=shard, sample_key=key, sample_index=number, byte_offset=begin,
            byte_size=end - begin,
        ))  # fmt: skip
        for file in files:
            self._parts.append(IndexSamplePart(
                tar_file_id=shard, sample_index=number, part_name=file.extension,
                content_byte_offset=file.offset, content_byte_size=file.size,
            ))  # fmt: skip
            if file.metadata is not None and _is_medium(file.extension.rpartition(".")[2]):
                self._media.append(IndexMediaMetadata(
                    entry_key=f"{key}.{file.extension}", metadata_type=_TYPES[file.is_image],
                    metadata_json=file.metadata,
                ))  # fmt: skip
        if len(self._samples) >= names.INDEX_BATCH_SIZE:
            self._flush()

    def finish(self, splits: dict[str, list[str]], dataset: dict) -> None:
        """Write what stands beside the index.

        Args:
            splits: the shards of each split.
            dataset: what dataset.yaml says.
        """
        info = WebdatasetInfo(energon_version=__version__, shard_counts=self._counts)
        parts = {name: collapse(shards, keep_order=True) for name, shards in splits.items()}
        texts = {
            names.INDEX_UUID_FILENAME: str(uuid.uuid4()),
            names.INFO_JSON_FILENAME: json.dumps(to_json_object(info), indent=2),
            names.SPLIT_YAML_FILENAME: yaml.dump(
                to_json_object(WebdatasetSplits(split_parts=parts)), sort_keys=False),
            "dataset.yaml": yaml.safe_dump(dataset, sort_keys=False),
        }
        for name, text in texts.items():
            (self._folder / name).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        with _as_os_errors():
            self._tables.append_samples(self._samples)
            self._tables.append_parts(self._parts)
            self._tables.append_media_metadata_batch(self._media)
        for rows in (self._samples, self._parts, self._media):
            rows.clear()


class Shard:
    """One shard of an index, to which its samples are added."""

    def __init__(self, index: ShardIndex, number: int):
        self._index, self._number = index, number
        self.begins: list[int] = []
        self.end = 0

    def add(self, key: str, begin: int, end: int, files: Iterable[IndexedFile]) -> None:
        """The next sample, from byte `begin` to byte `end`."""
        self._index.add(self._number, len(self.begins), key, begin, end, files)
        self.begins.append(begin)
        self.end = end


@cache
def _is_medium(extension: str) -> bool:
    return _MEDIA.should_consider_media(f"0.{extension}")


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """SQLite's errors, such as of a full disk, as the others of writing."""
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(str(error)) from error
