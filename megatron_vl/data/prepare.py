"""Raw data to WebDataset shards that energon reads: no questions asked, nothing dropped untold.

Entries are read and checked, every image is decoded once, shards are written with the images' own
bytes, energon's own `prepare` indexes them, and the finished directory is renamed into place.
What was refused, and why, is in its `refused.jsonl`.
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path

from tqdm import tqdm

from megatron_vl.data.formats import llava
from megatron_vl.data.media import MAX_ASPECT_RATIO, BadImage, decode_rgb
from megatron_vl.errors import InputError
from megatron_vl.outputs import check_target, replacing

KNOWN_JSON = "blip_laion_cc_sbu_558k.json"  # LLaVA-Pretrain's own, beside a *_meta.json
FORMATS = {"llava": llava.check_question_and_answer}  # format -> check of one entry
REFUSED = "refused.jsonl"
SPLITS = ("train", "val", "test")  # energon's names


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What to prepare, and how."""

    source: Path  # a directory with one JSON file and its media, or the JSON file
    output: Path  # the dataset's directory, to be made
    format: str = "llava"  # one of FORMATS
    json_name: str | None = None  # the JSON file in `source`, where it holds several
    media_root: Path | None = None  # what media paths are relative to; None: the JSON's directory
    split: str = "9,1,0"  # shares of train, validation and test
    samples_per_shard: int = 10_000
    shuffle: bool = True  # mix entries; without, the validation split is the end of the file
    seed: int = 42
    num_workers: int = 2  # processes that check images and index shards
    overwrite: bool = False  # replace `output` if it exists
    strict: bool = False  # refuse the whole dataset when any entry is refused
    progress: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(
                f"--format is {self.format!r}; it must be one of: {', '.join(sorted(FORMATS))}."
            )
        for name in ("samples_per_shard", "num_workers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1.")
        self.shares  # noqa: B018  (raises for a bad split)

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """Train's, validation's and test's part of the whole."""
        try:
            shares = [Fraction(share.strip()) for share in self.split.split(",")]
            if len(shares) != 3 or min(shares) < 0 or shares[0] <= 0:
                raise ValueError
        except (ValueError, ZeroDivisionError) as error:
            raise InputError(
                f"--split is {self.split!r}; give the shares of train, validation and test, such "
                f"as 9,1,0."
            ) from error
        return tuple(share / sum(shares) for share in shares)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One usable entry of the source."""

    key: str  # unique; starts with the entry's place in the JSON
    media: Path
    conversations: list

    @property
    def extension(self) -> str:
        return self.media.suffix[1:].lower()


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """One entry that was left out."""

    file: str
    entry: int  # from 0, its place in the JSON
    id: str | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What became of the source."""

    output: Path
    kept: int
    refused: tuple[Refusal, ...]
    samples: dict[str, int]  # of each split
    shards: int
    shared_images: int  # shown in more than one split

    def __str__(self) -> str:
        parts = ", ".join(f"{count} {name}" for name, count in self.samples.items() if count)
        lines = [f"{self.output}: kept {self.kept} samples in {self.shards} shards ({parts})"]
        if self.shared_images:
            lines.append(
                f"images that more than one split shows: {self.shared_images} (prepare with "
                f"--shuffle or another --split to keep them apart)"
            )
        if self.refused:
            lines.append(f"refused {len(self.refused)}, listed in {self.output / REFUSED}:")
            reasons = Counter(re.sub(r"\S*[/\\]\S*|\d+", "…", r.reason) for r in self.refused)
            lines += [f"  {count} x {reason}" for reason, count in reasons.most_common(10)]
        return "\n".join(lines)


def prepare(config: PrepareConfig) -> Summary:
    """Make the dataset of `config`.

    Raises:
        InputError: no readable source, an output that exists, or nothing usable.
    """
    needed = [config.source, config.source / (config.json_name or ""), Path.cwd()]
    needed += [config.media_root] if config.media_root else []
    check_target(
        config.output, overwrite=config.overwrite, needed=needed, what="prepared dataset",
        is_ours=lambda there: (there / ".nv-meta").is_dir(),
    )
    json_path = find_json(config.source, config.json_name)
    raw = read_json(json_path)
    entries, refused = check_entries(raw, json_path, config)
    with replacing(config.output) as partial:
        entries, refused = check_media(entries, refused, json_path, config)
        if not entries:
            first = f"; the first because {refused[0].reason}" if refused else ""
            raise InputError(
                f"none of the {len(raw)} entries of {json_path} can be used{first}; check the "
                f"format and where the images are (--media-root)."
            )
        if refused and config.strict:
            raise InputError(
                f"{len(refused)} of {len(raw)} entries of {json_path} cannot be used, the first "
                f"(entry {refused[0].entry}) because {refused[0].reason}; mend them or prepare "
                f"without --strict."
            )
        shards, parts = plan_shards(entries, config)
        write_shards(shards, partial, progress=config.progress)
        run_energon_prepare(partial, entries, parts, config)
        samples = read_back(partial, len(entries))
        (partial / REFUSED).write_text(
            "".join(json.dumps(_fields(r), ensure_ascii=False) + "\n" for r in refused),
            encoding="utf-8",
        )
    return Summary(
        output=config.output, kept=len(entries), refused=tuple(refused), samples=samples,
        shards=len(shards), shared_images=count_shared_images(shards, parts),
    )  # fmt: skip


def find_json(source: Path, name: str | None) -> Path:
    """The JSON file to read.

    Raises:
        InputError: it is not there, or there are several to choose from.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise InputError(f"{source} does not exist; give the directory that holds the JSON file.")
    if name is not None:
        if not (source / name).is_file():
            raise InputError(
                f"{source / name} does not exist; give --json the name of a file there."
            )
        return source / name
    if (source / KNOWN_JSON).is_file():
        return source / KNOWN_JSON
    found = sorted(source.glob("*.json"))
    if len(found) == 1:
        return found[0]
    have = f"has {', '.join(path.name for path in found)}" if found else "has no .json file"
    raise InputError(f"{source} {have}; name the one to read with --json.")


def read_json(path: Path) -> list:
    """The list in a JSON file.

    Raises:
        InputError: it is not JSON, or no list.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); check the file.") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            f"download or write it again."
        ) from error
    if not isinstance(raw, list) or not raw:
        raise InputError(f"{path} holds no list of entries; give a file with [{{...}}, ...].")
    return raw


def check_entries(
    raw: Sequence, json_path: Path, config: PrepareConfig
) -> tuple[list[Entry], list[Refusal]]:
    """The entries whose text is usable and whose media exist, and those refused."""
    root = config.media_root or json_path.parent
    check = FORMATS[config.format]
    known: dict[str, Path | None] = {}
    entries, refused = [], []
    width = len(str(len(raw) - 1))
    for number, entry in enumerate(raw):
        name = entry.get("id") if isinstance(entry, dict) else None
        try:
            if not isinstance(entry, dict):
                raise llava.BadEntry("it is not an object")
            check(entry)
            image = entry["image"]
            if image not in known:
                known[image] = _find_media(root, image)
            if known[image] is None:
                raise llava.BadEntry(f"its image {root / image} does not exist")
            if not known[image].suffix[1:].isalnum():
                raise llava.BadEntry(f"its image {root / image} has no file extension")
        except llava.BadEntry as error:
            refused.append(_refusal(json_path, number, name, str(error)))
            continue
        entries.append(
            Entry(
                key=f"{number:0{width}d}{_safe(name)}",
                media=known[image],
                conversations=entry["conversations"],
            )
        )
    return entries, refused


def _find_media(root: Path, image: str) -> Path | None:
    """LLaVA's images lie beside the JSON, or in `images` beside it.

    Raises:
        BadEntry: a path the system refuses, such as one too long.
    """
    try:
        return next((p for p in (root / image, root / "images" / image) if p.is_file()), None)
    except OSError as error:
        raise llava.BadEntry(f"its image cannot be read ({error})") from error


def _safe(name) -> str:
    """An entry's id as the end of a key: energon cuts keys at dots, tar at slashes."""
    text = re.sub(r"[^A-Za-z0-9_-]+", "-", str(name))[:64] if name is not None else ""
    return f"-{text}" if text else ""


def check_media(
    entries: list[Entry], refused: list[Refusal], json_path: Path, config: PrepareConfig
) -> tuple[list[Entry], list[Refusal]]:
    """Decode every image once, and refuse the entries whose image cannot be.

    energon's own prepare would drop a whole shard for one such image.
    """
    media = sorted({entry.media for entry in entries})
    with ProcessPoolExecutor(min(config.num_workers, max(1, len(media) // 64))) as pool:
        found = pool.map(_media_problem, media, chunksize=64)
        problems = {
            path: problem
            for path, problem in zip(
                media, _progress(found, len(media), "checking images", config.progress), strict=True
            )
            if problem
        }
    kept = []
    for entry in entries:
        if entry.media in problems:
            number = int(re.match(r"\d+", entry.key)[0])
            name = entry.key.partition("-")[2] or None
            reason = f"its image {entry.media} is unusable: {problems[entry.media]}"
            refused.append(_refusal(json_path, number, name, reason))
        else:
            kept.append(entry)
    return kept, sorted(refused, key=lambda refusal: refusal.entry)


def _media_problem(path: Path) -> str | None:
    try:
        width, height = decode_rgb(path.read_bytes()).size
    except (BadImage, OSError) as error:
        return str(error)
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return f"it is {width} x {height} pixels, too long and thin"
    return None


def plan_shards(
    entries: Sequence[Entry], config: PrepareConfig
) -> tuple[list[list[Entry]], dict[str, range]]:
    """Which entry goes to which shard, and which shards to which split.

    Shuffled entries that show the same image stay in the same split where the sizes allow it, so
    that validation images are not trained on; `count_shared_images` says where they do not.

    Raises:
        InputError: fewer entries than shards the split needs.
    """
    shares = config.shares
    total = max(
        -(-len(entries) // config.samples_per_shard),
        *(-(-share.denominator // share.numerator) for share in shares if share),
    )
    bounds = [int(total * share) for share in accumulate(shares, initial=Fraction(0))]
    while any(share and a == b for share, (a, b) in zip(shares, _pairs(bounds), strict=True)):
        total += 1
        bounds = [int(total * share) for share in accumulate(shares, initial=Fraction(0))]
    if total > len(entries):
        raise InputError(
            f"a split of {config.split} needs at least {total} samples but {len(entries)} are "
            f"usable; give more data or another --split."
        )
    order = list(entries)
    if config.shuffle:
        order = _shuffle_by_media(order, random.Random(config.seed))
    shards: list[list[Entry]] = []
    parts = {}
    begin = 0
    for split, (first, last) in zip(SPLITS, _pairs(bounds), strict=True):
        if first == last:
            continue
        parts[split] = range(first, last)
        end = len(order) * last // total
        if config.shuffle and end < len(order):
            least, most = begin + last - first, len(order) - total + last
            end = _media_edge(order, end, least=least, most=most)
        part = order[begin:end]
        if config.shuffle:
            random.Random(config.seed + 1).shuffle(part)
        cuts = [len(part) * i // (last - first) for i in range(last - first + 1)]
        shards += [part[a:b] for a, b in _pairs(cuts)]
        begin = end
    return shards, parts


def _shuffle_by_media(entries: list[Entry], draw: random.Random) -> list[Entry]:
    """The entries with images in random order, each image's entries side by side."""
    groups: dict[Path, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.media, []).append(entry)
    order = list(groups.values())
    draw.shuffle(order)
    return [entry for group in order for entry in group]


def _media_edge(order: Sequence[Entry], end: int, *, least: int, most: int) -> int:
    """The first cut at or after `end` that parts no image's entries; `end` if there is none."""
    for cut in range(max(end, least), most + 1):
        if order[cut - 1].media != order[cut].media:
            return cut
    return end


def count_shared_images(shards: Sequence[Sequence[Entry]], parts: dict[str, range]) -> int:
    """Images, by path, that more than one split shows."""
    splits_of = Counter(
        media
        for part in parts.values()
        for media in {entry.media for number in part for entry in shards[number]}
    )
    return sum(count > 1 for count in splits_of.values())


def _shard(number: str) -> str:
    return f"shard-{number}.tar"


def write_shards(shards: Sequence[Sequence[Entry]], output: Path, *, progress: bool) -> None:
    """Write `shard-NNNNNN.tar` files: per sample the image's own bytes and the conversations."""
    total = sum(map(len, shards))
    entries = iter(_progress((e for shard in shards for e in shard), total, "writing", progress))
    for number, shard in enumerate(shards):
        path = output / _shard(f"{number:06d}")
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in shard:
                entry = next(entries)
                _add(tar, f"{entry.key}.{entry.extension}", entry.media.read_bytes())
                text = json.dumps(entry.conversations, ensure_ascii=False)
                _add(tar, f"{entry.key}.json", text.encode("utf-8"))
    next(entries, None)  # lets the progress bar finish


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no times, no owners: the same data gives the same bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def run_energon_prepare(
    path: Path, entries: Iterable[Entry], parts: dict[str, range], config: PrepareConfig
) -> None:
    """energon's own `prepare`, in a process of this interpreter.

    The splits are given by shard: energon's ratio is rounded in floating point and can lose one.

    Raises:
        InputError: it failed; its last words are in the message.
    """
    field_map = {
        "image": ",".join(sorted({entry.extension for entry in entries})),
        "context": "json[0][value]",
        "answers": "json[1][value]",
    }
    command = [
        sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(path),
        "--non-interactive", "--force-overwrite", "--no-progress",
        "--num-workers", str(config.num_workers),
        *(word for split, shards in parts.items() for word in (
            "--split-parts", f"{split}:{_shard(f'{{{shards[0]:06d}..{shards[-1]:06d}}}')}"
        )),
        "--sample-type", "VQASample",
        "--field-map", json.dumps(field_map),
        "--media-metadata-by-extension",
    ]  # fmt: skip
    if config.progress:
        print(f"energon {' '.join([command[3], str(config.output), *command[5:]])}", flush=True)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode or not (path / ".nv-meta" / "dataset.yaml").is_file():
        words = " / ".join(done.stdout.strip().splitlines()[-3:])
        raise InputError(
            f"energon could not index the shards (exit {done.returncode}: {words}); check the disk "
            f"space and the installation of megatron-energon."
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


def _pairs(bounds: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(bounds))


def _progress(items: Iterable, total: int, what: str, show: bool) -> Iterator:
    return tqdm(items, total=total, desc=what, mininterval=1.0, disable=not show)


def _refusal(json_path: Path, number: int, name, reason: str) -> Refusal:
    """Lone surrogates are escaped: what is refused must be writable."""
    escaped = [
        None if text is None else str(text).encode("utf-8", "backslashreplace").decode("utf-8")
        for text in (name, reason)
    ]
    return Refusal(file=str(json_path), entry=number, id=escaped[0], reason=escaped[1])


def _fields(refusal: Refusal) -> dict:
    return {name: getattr(refusal, name) for name in ("file", "entry", "id", "reason")}
