"""Usable entries to WebDataset shards, and energon's index of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from megatron_vl.data.contents import Digested
from megatron_vl.data.conversation import Turn, to_json
from megatron_vl.data.raw.media import Measured, RawMedia
from megatron_vl.errors import InputError
from megatron_vl.models.media import IMAGE, MediaSettings, StoredMedia

SPLITS = ("train", "val", "test")  # energon's names
DATASET = {  # .nv-meta/dataset.yaml: our cooker reads the JSON, and the media when they are needed
    "__module__": "megatron.energon",
    "__class__": "CrudeWebdataset",
    "part_filter": ["json"],
}
# Of every file in a shard: the same data give the same bytes.
_ALWAYS = {"mtime": 0, "user": "", "group": "", "mode": 0o644}
_BLOCK = 512  # bytes that a file in a tar is rounded up to


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One usable entry of the source."""

    number: int  # its place in the source, from 0
    name: str | None  # the source's own id
    turns: tuple[Turn, ...]
    media: tuple[RawMedia, ...]
    settings: tuple[MediaSettings | None, ...] = ()  # of each of `media`; empty: of none
    paths: tuple[str | None, ...] = ()  # the same, as the source names them
    tools: str = ""  # see Conversation


class File(NamedTuple):
    """One file of a medium, on its way into a shard."""

    extension: str  # its name there, after the sample's key
    path: Path
    metadata: str | None  # JSON, for energon's index
    is_image: bool


def plan_shards(
    entries: Sequence[Entry], *, shares: Sequence[Fraction], samples_per_shard: int,
    seed: int | None,
) -> tuple[list[list[Entry]], dict[str, range]]:
    """Which entry goes to which shard, and which shards to which split.

    Shuffled entries that show the same image or video stay in the same split where the sizes allow
    it, so that validation images are not trained on; `count_shared_media` says where they do not.

    Args:
        shares: train's, validation's and test's part of the whole.
        seed: of the shuffle; None keeps the order of the source.

    Raises:
        InputError: fewer entries than shards the split needs.
    """
    total = max(
        -(-len(entries) // samples_per_shard),
        *(-(-share.denominator // share.numerator) for share in shares if share),
    )
    bounds = [int(total * share) for share in accumulate(shares, initial=Fraction(0))]
    while any(share and a == b for share, (a, b) in zip(shares, pairwise(bounds), strict=True)):
        total += 1
        bounds = [int(total * share) for share in accumulate(shares, initial=Fraction(0))]
    if total > len(entries):
        raise InputError(
            f"the split needs at least {total} samples but {len(entries)} are usable; give more "
            f"data or another --split."
        )
    order, group_of = list(entries), {}
    if seed is not None:
        order, group_of = _shuffle_by_media(order, random.Random(seed))
    shards: list[list[Entry]] = []
    parts = {}
    begin = 0
    for split, (first, last) in zip(SPLITS, pairwise(bounds), strict=True):
        if first == last:
            continue
        parts[split] = range(first, last)
        end = len(order) * last // total
        if seed is not None and end < len(order):
            least, most = begin + last - first, len(order) - total + last
            # Not far: where nearly all entries share media, a split must not swallow the next.
            most = min(most, end + max(1, (len(order) - end) // 4))
            end = _group_edge([group_of[entry.number] for entry in order], end,
                              least=least, most=most)
        part = order[begin:end]
        if seed is not None:
            random.Random(seed + 1).shuffle(part)
        cuts = [len(part) * i // (last - first) for i in range(last - first + 1)]
        shards += [part[a:b] for a, b in pairwise(cuts)]
        begin = end
    return shards, parts


def _shuffle_by_media(
    entries: list[Entry], draw: random.Random
) -> tuple[list[Entry], dict[int, int]]:
    """The entries in random order, those that share media side by side; and each one's group."""
    leader: dict[int, int] = {}  # of a group of entries, by entry

    def find(number: int) -> int:
        while leader[number] != number:
            leader[number] = number = leader[leader[number]]
        return number

    first_with: dict[RawMedia, int] = {}
    for entry in entries:
        leader[entry.number] = entry.number
        for media in entry.media:
            other = first_with.setdefault(media, entry.number)
            leader[find(entry.number)] = find(other)
    group_of = {entry.number: find(entry.number) for entry in entries}
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(group_of[entry.number], []).append(entry)
    order = list(groups.values())
    draw.shuffle(order)
    return [entry for group in order for entry in group], group_of


def _group_edge(groups: Sequence[int], end: int, *, least: int, most: int) -> int:
    """The first cut at or after `end` that parts no group; `end` if there is none."""
    for cut in range(max(end, least), most + 1):
        if groups[cut - 1] != groups[cut]:
            return cut
    return end


def count_shared_media(shards: Sequence[Sequence[Entry]], parts: dict[str, range]) -> int:
    """Images and videos, by path, that more than one split shows."""
    splits_of = Counter(
        media
        for part in parts.values()
        for media in {m for number in part for entry in shards[number] for m in entry.media}
    )
    return sum(count > 1 for count in splits_of.values())


def _shard(number: int) -> str:
    return f"shard-{number:06d}.tar"


def write_shards(
    shards: Sequence[Sequence[Entry]], parts: dict[str, range], sizes: dict[RawMedia, Measured],
    output: Path, *, key, progress: bool,
) -> dict[str, str]:
    """Write `shard-NNNNNN.tar` files, per sample its JSON, then its media's own bytes, and their
    index.

    Args:
        parts: the shards of each split.
        key: an entry's key.

    Returns:
        The digest of every shard, by its name.

    Raises:
        OSError: something cannot be read or written.
    """
    from webdataset import TarWriter  # imports torch

    from megatron_vl.data.raw.shard_index import IndexedFile, ShardIndex  # imports energon

    digests = {}
    total = sum(map(len, shards))
    entries = iter(show_progress(
        (entry for shard in shards for entry in shard), total, "writing", progress
    ))
    with ShardIndex(output) as index:
        for number, shard in enumerate(shards):
            name = _shard(number)
            with (
                (output / name).open("wb") as opened, index.shard(name) as indexed,
                TarWriter(file := Digested(opened), encoder=False, **_ALWAYS) as writer,
            ):
                for _ in shard:
                    entry = next(entries)
                    stored, files = store(entry, sizes)
                    begin, name_of = writer.tarstream.offset, key(entry)
                    members = [("json", to_json(entry.turns, stored, entry.tools), None, False)]
                    members += [
                        (extension, path.read_bytes(), metadata, is_image)
                        for extension, path, metadata, is_image in files
                    ]
                    added = []
                    for extension, data, metadata, is_image in members:
                        # One at a time: of several it would sort the JSON behind the media.
                        writer.write({"__key__": name_of, extension: data})
                        end = writer.tarstream.offset
                        offset = end - -(-len(data) // _BLOCK) * _BLOCK
                        added.append(IndexedFile(extension, offset, len(data), metadata, is_image))
                    indexed.add(name_of, begin, end, added)
            digests[name] = file.digest
        next(entries, None)  # lets the progress bar finish
    index.finish({split: list(map(_shard, part)) for split, part in parts.items()}, DATASET)
    return digests


def store(
    entry: Entry, sizes: dict[RawMedia, Measured]
) -> tuple[tuple[StoredMedia, ...], list[File]]:
    """An entry's media as its JSON tells them, and their files in the shard."""
    stored, files = [], []
    for place, media in enumerate(entry.media):
        measured = sizes[media]
        names = [
            f"{place}.{number:05d}.{told.extension}" if media.separate else
            f"{place}.{told.extension}"
            for number, told in enumerate(measured.files)
        ]
        is_image = media.kind == IMAGE or media.separate
        files += [
            File(name, path, told.metadata, is_image)
            for name, path, told in zip(names, media.files, measured.files, strict=True)
        ]
        info = measured.info
        stored.append(StoredMedia(
            kind=media.kind, files=tuple(names), height=info.height, width=info.width,
            num_frames=info.num_frames, fps=info.fps, separate=media.separate,
            settings=entry.settings[place] if entry.settings else None,
            path=entry.paths[place] if entry.paths else None,
        ))
    return tuple(stored), files


def read_back(path: Path, expected: int) -> dict[str, int]:
    """Samples of each split, as a run will find them.

    Raises:
        InputError: fewer are indexed than were written.
    """
    from megatron_vl.data.dataset_dir import check_dataset, splits

    counts = {name: check_dataset(path, name) for name in splits(path)}
    if sum(counts.values()) != expected:
        raise InputError(
            f"{sum(counts.values())} of {expected} samples are indexed; check the disk and prepare "
            f"again."
        )
    return counts


def show_progress(items: Iterable, total: int | None, what: str | None, show: bool) -> Iterator:
    """`items`, with a bar that tells the rate and what is left."""
    return tqdm(items, total=total, desc=what, mininterval=1.0, disable=not show)
