"""Usable entries to WebDataset shards, and energon's index of them."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path

import yaml
from tqdm import tqdm

from megatron_vl.data.contents import Digested
from megatron_vl.data.conversation import StoredMedia, Turn, to_json
from megatron_vl.data.media import MediaInfo
from megatron_vl.data.media_settings import MediaSettings
from megatron_vl.data.raw_media import RawMedia
from megatron_vl.errors import InputError

SPLITS = ("train", "val", "test")  # energon's names
DATASET = {  # .nv-meta/dataset.yaml: our cooker reads the JSON, and the media when they are needed
    "__module__": "megatron.energon",
    "__class__": "CrudeWebdataset",
    "part_filter": ["json"],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One usable entry of the source."""

    number: int  # its place in the source, from 0
    name: str | None  # the source's own id
    turns: tuple[Turn, ...]
    media: tuple[RawMedia, ...]
    settings: tuple[MediaSettings | None, ...] = ()  # of each of `media`; empty: of none
    tools: str = ""  # see Conversation


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


def _shard(number: str) -> str:
    return f"shard-{number}.tar"


def write_shards(
    shards: Sequence[Sequence[Entry]], sizes: dict[RawMedia, MediaInfo], output: Path, *,
    key, progress: bool,
) -> dict[str, str]:
    """Write `shard-NNNNNN.tar` files: per sample its JSON, then its media's own bytes.

    Args:
        key: an entry's key.

    Returns:
        The digest of every shard, by its name.
    """
    digests = {}
    total = sum(map(len, shards))
    entries = iter(show_progress(
        (entry for shard in shards for entry in shard), total, "writing", progress
    ))
    for number, shard in enumerate(shards):
        name = _shard(f"{number:06d}")
        with (output / name).open("wb") as opened, tarfile.open(
            fileobj=(file := Digested(opened)), mode="w", format=tarfile.USTAR_FORMAT
        ) as tar:
            for _ in shard:
                entry = next(entries)
                stored, files = store(entry, sizes)
                _add(tar, f"{key(entry)}.json", to_json(entry.turns, stored, entry.tools))
                for extension, media in files:
                    _add(tar, f"{key(entry)}.{extension}", media.read_bytes())
        digests[name] = file.digest
    next(entries, None)  # lets the progress bar finish
    return digests


def store(
    entry: Entry, sizes: dict[RawMedia, MediaInfo]
) -> tuple[tuple[StoredMedia, ...], list[tuple[str, Path]]]:
    """An entry's media as its JSON tells them, and the files by their extension in the shard."""
    stored, files = [], []
    for place, media in enumerate(entry.media):
        names = [
            f"{place}.{number:05d}.{file.suffix[1:].lower()}" if media.separate else
            f"{place}.{file.suffix[1:].lower()}"
            for number, file in enumerate(media.files)
        ]
        files += zip(names, media.files, strict=True)
        size = sizes[media]
        stored.append(StoredMedia(
            kind=media.kind, files=tuple(names), height=size.height, width=size.width,
            num_frames=size.num_frames, fps=size.fps, separate=media.separate,
            settings=entry.settings[place] if entry.settings else None,
        ))
    return tuple(stored), files


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no times, no owners: the same data gives the same bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def run_energon_prepare(
    path: Path, parts: dict[str, range], *, num_workers: int, shown_as: Path | None
) -> None:
    """energon's own `prepare`, in a process of this interpreter, and dataset.yaml.

    The splits are given by shard: energon's ratio is rounded in floating point and can lose one.

    Args:
        shown_as: print the command with this directory; None prints nothing.

    Raises:
        InputError: it failed; its last words are in the message.
    """
    command = [
        sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(path),
        "--non-interactive", "--force-overwrite", "--no-progress",
        "--num-workers", str(num_workers),
        *(word for split, shards in parts.items() for word in (
            "--split-parts", f"{split}:{_shard(f'{{{shards[0]:06d}..{shards[-1]:06d}}}')}"
        )),
        "--media-metadata-by-extension",
    ]  # fmt: skip
    if shown_as is not None:
        print(f"energon {' '.join([command[3], str(shown_as), *command[5:]])}", flush=True)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode or not (path / ".nv-meta" / "split.yaml").is_file():
        words = " / ".join(done.stdout.strip().splitlines()[-3:])
        raise InputError(
            f"energon could not index the shards (exit {done.returncode}: {words}); check the disk "
            f"space and the installation of megatron-energon."
        )
    (path / ".nv-meta" / "dataset.yaml").write_text(
        yaml.safe_dump(DATASET, sort_keys=False), encoding="utf-8"
    )


def read_back(path: Path, expected: int) -> dict[str, int]:
    """Samples of each split, as energon counted them.

    Raises:
        InputError: energon indexed fewer samples than were written.
    """
    from megatron_vl.data.dataset_dir import check_dataset, splits

    counts = {name: check_dataset(path, name) for name in splits(path)}
    if sum(counts.values()) != expected:
        raise InputError(
            f"energon indexed {sum(counts.values())} of {expected} samples; check the disk space "
            f"and prepare again."
        )
    return counts


def show_progress(items: Iterable, total: int | None, what: str | None, show: bool) -> Iterator:
    """`items`, with a bar that tells the rate and what is left."""
    return tqdm(items, total=total, desc=what, mininterval=1.0, disable=not show)
