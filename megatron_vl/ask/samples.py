"""Conversations whose answers are known: of a prepared dataset, or of raw data as `prepare` reads
them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from megatron.energon import SkipSample

from megatron_vl.ask.media import Read, stored_media
from megatron_vl.data.contents import contents_of
from megatron_vl.data.conversation import BadEntry, Turn
from megatron_vl.data.dataset_dir import split_shards
from megatron_vl.data.lint.look import build_encoder
from megatron_vl.data.lint.reading import Leaf, open_leaves
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.raw.media import Library
from megatron_vl.data.raw.sources import RawSource, open_source
from megatron_vl.errors import Bounds, InputError
from megatron_vl.models.media import StoredMedia
from megatron_vl.weights.files import fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One conversation."""

    turns: tuple[Turn, ...]
    media: tuple[StoredMedia, ...]
    read: Read
    tools: str = ""
    groups: tuple[str, ...] = ()


class Dataset(Protocol):
    """Samples by their numbers from 0."""

    path: Path
    name: str  # among those that are open together
    mark: str  # what tells its samples from others

    def __len__(self) -> int: ...

    def key(self, number: int) -> str:
        """Where a person finds a sample."""

    def sample(self, number: int) -> Sample:
        """Raises BadEntry, BadMedia: it cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawOptions:
    """How raw data are read: see `prepare`; None: not given."""

    format: str | None = None  # llava
    json: str | None = None  # the file in a directory that has several
    dataset: str | None = None  # a name in a directory's dataset_info.json
    media_root: Path | None = None
    group_by: str | None = None  # key of an entry: the name of its group, or a list of several


def open_datasets(paths: Sequence[Path], split: str | None, raw: RawOptions) -> list[Dataset]:
    """The datasets of all paths, called by the last parts of where they lie, as few as will do.

    Args:
        split: of prepared datasets; None: val.

    Raises:
        InputError: one cannot be read, or is there twice; or an option is for none of them.
    """
    are_prepared = [*map(_is_prepared, paths)]
    unused = [] if any(are_prepared) or split is None else [("--split", "a prepared dataset")]
    unused += [(f"--{name.replace('_', '-')}", "raw data") for name, given in asdict(raw).items()
               if given is not None and all(are_prepared)]
    for flag, what in unused:
        raise InputError(f"{flag} is for {what}, which no DATASET here is; leave it out.")
    found = [one for path in paths for one in _open(path, split or "val", raw)]
    places = [one.path.absolute() for one in found]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise InputError(f"the dataset {twice} is given twice; give it once.")
    count = 1
    while len({place.parts[-count:] for place in places}) < len(places):
        count += 1
    for one, place in zip(found, places, strict=True):
        one.name = str(Path(*place.parts[-count:]))
    return found


def _is_prepared(path: Path) -> bool:
    return (path / ".nv-meta").is_dir() or path.suffix in (".yaml", ".yml")


def _open(path: Path, split: str, raw: RawOptions) -> list[Dataset]:
    """The prepared datasets of a directory or a metadataset, or the one of raw data."""
    if _is_prepared(path):
        if raw.group_by is not None:
            raise InputError(
                f"--group-by {raw.group_by} names a key of raw data, which the prepared dataset "
                f"{path} does not keep; give the JSON that it was made of."
            )
        mixture = Mixture.parse(str(path))
        leaves = open_leaves(mixture, split)
        encoder = build_encoder(
            DataConfig(train=mixture, seq_length=1), None, None, None, split=split
        )
        return [PreparedDataset(leaf, encoder, split) for leaf in leaves]
    source = open_source(path, format=raw.format or "llava", json_name=raw.json,
                         dataset=raw.dataset)
    return [RawDataset(source, raw, path)]


class PreparedDataset:
    """One split of what `prepare`, or energon, wrote."""

    def __init__(self, leaf: Leaf, encoder, split: str):
        self.leaf, self.encoder, self.path, self.name = leaf, encoder, leaf.path, leaf.path.name
        shards = split_shards(leaf.path, split)
        self.mark = repr(sorted(contents_of(leaf.path, shards).items()))

    def __len__(self) -> int:
        return len(self.leaf.places)

    def key(self, number: int) -> str:
        return f"sample {self.leaf.places[number]}"

    def sample(self, number: int) -> Sample:
        raw = self.leaf.read(self.leaf.places[number])
        if raw is None:
            raise BadEntry("not served", "its dataset's split.yaml excludes it")
        try:
            found = self.encoder.conversation(self.leaf.load(raw))
        except SkipSample:
            (problem,), self.encoder.skipped = self.encoder.skipped, []
            raise BadEntry(problem.reason, problem.message) from None
        return Sample(turns=found.turns, media=found.media, read=found.read, tools=found.tools)


class RawDataset:
    """The entries of a file of a raw format; their media are measured when they are asked about."""

    def __init__(self, source: RawSource, options: RawOptions, path: Path):
        self.source, self.options, self.path, self.name = source, options, path, path.name
        self.entries = list(source.entries())
        self.mark = repr([fingerprint(file) for file in source.files])
        self.scratch = tempfile.TemporaryDirectory(prefix="megatron-vl-")
        roots = [one for one in (options.media_root, source.root) if one is not None]
        self.library = Library(roots, Path(self.scratch.name),
                               prefers_frames=source.format == "chatml")

    def __len__(self) -> int:
        return len(self.entries)

    def key(self, number: int) -> str:
        one = self.entries[number]
        return one.where if len(self.source.files) == 1 else f"{one.where} of {one.file.name}"

    def sample(self, number: int) -> Sample:
        entry = self.entries[number].entry
        if isinstance(entry, BadEntry):
            raise entry
        said = self.source.read(entry)
        media = [self.library.locate(one) for one in said.media]
        stored, read = stored_media(
            media, [one.settings for one in said.media], [one.path for one in said.media]
        )
        return Sample(turns=said.turns, media=stored, read=read, tools=said.tools,
                      groups=self._groups(entry))

    def _groups(self, entry: dict) -> tuple[str, ...]:
        key = self.options.group_by
        if key is None:
            return ()
        named = entry.get(key)
        names = named if isinstance(named, list) else [named]
        if not names or not all(isinstance(name, str) for name in names):
            raise BadEntry("wrong shape", f"its {key}, which --group-by names, is no text and no "
                                          f"list of texts")
        return tuple(names)


def chosen(dataset: Dataset, limit: int | None, seed: int) -> list[int]:
    """Numbers of the samples to ask about: all, or `limit` drawn at random; ascending."""
    if limit is None or limit >= len(dataset):
        return list(range(len(dataset)))
    Bounds(least=1, most=10**12).check("--limit", limit)
    return sorted(random.Random(seed).sample(range(len(dataset)), limit))


def asked_turns(sample: Sample) -> Iterator[tuple[int, tuple[Turn, ...], tuple[StoredMedia, ...]]]:
    """Of every supervised answer: its number among the turns, the turns before it, their media."""
    for number, turn in enumerate(sample.turns):
        if turn.role == "assistant" and turn.trained:
            before = sample.turns[:number]
            yield number, before, sample.media[: sum(len(one.media) for one in before)]
