"""Raw data to WebDataset shards that energon reads: no questions asked, nothing dropped untold.

Entries are read and checked, every image is decoded once and of every video its ends, shards are
written with the media's own bytes and their sizes, energon's index with them, and the finished
directory is renamed into place. What was refused, and why, is in its `refused.jsonl`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.data.contents import note_digests
from megatron_vl.data.conversation import BadEntry, Conversation
from megatron_vl.data.grounding import measured
from megatron_vl.data.options import BOUNDS
from megatron_vl.data.raw.formats import FORMATS, Fields
from megatron_vl.data.raw.media import Library, Measured, RawMedia, measure_all
from megatron_vl.data.raw.notes import Notes
from megatron_vl.data.raw.refusals import MENDS, Refusal, counted, other_formats
from megatron_vl.data.raw.shards import (
    Entry,
    count_shared_media,
    plan_shards,
    read_back,
    show_progress,
    store,
    write_shards,
)
from megatron_vl.data.raw.sources import RawSource, open_source
from megatron_vl.errors import Bounds, InputError, check_bounds, shown
from megatron_vl.models.media import FRAMES_A_PATCH, VIDEO, MediaLimits
from megatron_vl.outputs import check_target, replacing

if TYPE_CHECKING:  # it imports torch, which preparing alone does not need
    from megatron_vl.data.raw.lengths import LengthCounter

REFUSED = "refused.jsonl"
SHAPES = ("wrong shape", "unknown role")  # reasons of entries of another format
MARKS = ("mend", "strict")  # of marks and media that do not pair off: read them, or refuse
_OWN_BOUNDS = {
    "samples_per_shard": Bounds(least=1, most=10**9), "num_workers": Bounds(least=1, most=1024),
    "max_length": Bounds(least=1, most=2**24),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What to prepare, and how."""

    source: Path  # a directory with its JSON, JSONL, parquet or tar files and media, or one file
    output: Path  # the dataset's directory, to be made
    format: str = "llava"  # one of FORMATS; what dataset_info.json says of `dataset` stands above
    json_name: str | None = None  # the file in `source`, where it holds several
    dataset: str | None = None  # a name in the source's dataset_info.json
    fields: Fields | None = None  # columns and tags that are not the format's own
    media_root: Path | None = None  # what media paths are relative to; None: the file's directory
    split: str = "9,1,0"  # shares of train, validation and test
    samples_per_shard: int = 10_000
    shuffle: bool = True  # mix entries; without, the validation split is the end of the file
    seed: int = 42
    num_workers: int = 2  # processes that check media
    lengths: LengthCounter | None = None  # counts a model's tokens, for `max_length`
    max_length: int | None = None  # tokens; longer samples are refused
    overwrite: bool = False  # replace `output` if it exists
    marks: str = "mend"  # one of MARKS
    strict: bool = False  # refuse the whole dataset when any entry is refused
    progress: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(
                f"--format is {self.format!r}; it must be one of: {', '.join(sorted(FORMATS))}."
            )
        if self.marks not in MARKS:
            raise InputError(f"--marks is {self.marks!r}; it must be one of: {', '.join(MARKS)}.")
        check_bounds(self, BOUNDS | _OWN_BOUNDS)
        if (self.lengths is None) != (self.max_length is None):
            raise InputError("give both --tokenizer and --max-length, or neither.")
        self.shares  # noqa: B018  (raises for a bad split)

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """Train's, validation's and test's part of the whole."""
        try:
            if not re.fullmatch(r"[\d./, ]{1,99}", self.split, re.ASCII):
                raise ValueError  # of 1e999999999 a fraction would be made
            shares = [Fraction(share.strip()) for share in self.split.split(",")]
            if len(shares) != 3 or min(shares) < 0 or not any(shares[:2]):
                raise ValueError
        except (ValueError, ZeroDivisionError) as error:
            raise InputError(
                f"--split is {shown(repr(self.split))}; give the shares of train, validation and "
                f"test, such as 9,1,0."
            ) from error
        return tuple(share / sum(shares) for share in shares)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What became of the source."""

    output: Path
    kept: int
    refused: tuple[Refusal, ...]
    samples: dict[str, int]  # of each split
    shards: int
    media: dict[str, int]  # images and videos, each counted once
    shared_media: int  # shown in more than one split
    notes: tuple[str, ...] = ()  # what was read other than it is written, or not at all

    def __str__(self) -> str:
        parts = ", ".join(f"{count} {name}" for name, count in self.samples.items() if count)
        media = ", ".join(
            f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in self.media.items()
        )
        lines = [
            f"{self.output}: kept {self.kept} samples in {self.shards} shards ({parts}); "
            f"{media or 'text only'}"
        ]
        if self.shared_media:
            lines.append(
                f"images that more than one split shows: {self.shared_media} (another "
                f"--split, or --shuffle where it was off, may keep them apart)"
            )
        lines += self.notes
        if self.refused:
            lines.append(f"refused {len(self.refused)}, listed in {self.output / REFUSED}:")
            lines += (f"  {line}" for line in counted(self.refused))
        return "\n".join(lines)


def prepare(config: PrepareConfig) -> Summary:
    """Make the dataset of `config`.

    Raises:
        InputError: no readable source, an output that exists, or nothing usable.
    """
    needed = [config.source, config.source / (config.json_name or ""), Path.cwd()]
    if config.media_root is not None:
        if not config.media_root.is_dir():
            raise InputError(
                f"--media-root {config.media_root} is no directory; give the one that paths of "
                f"images and videos start from."
            )
        needed.append(config.media_root)
    check_target(
        config.output, overwrite=config.overwrite, needed=needed, what="prepared dataset",
        is_ours=lambda there: (there / ".nv-meta").is_dir(),
    )
    source = open_source(
        config.source, format=config.format, json_name=config.json_name, dataset=config.dataset,
        fields=config.fields,
    )
    with replacing(config.output) as partial:
        preparation = _Preparation(config, source, scratch=partial / ".media")
        preparation.read()
        sizes = preparation.measure()
        if config.lengths is not None:
            preparation.refuse_long(sizes)
        entries, refused = preparation.result()
        try:
            shards, parts = plan_shards(
                entries, shares=config.shares, samples_per_shard=config.samples_per_shard,
                seed=config.seed if config.shuffle else None,
            )
        except InputError as error:
            if not refused:
                raise
            raise InputError(
                f"{error} {len(refused)} entries were refused: {'; '.join(counted(refused))}."
            ) from error
        digests = write_shards(
            shards, parts, sizes, partial, key=preparation.key, progress=config.progress
        )
        shutil.rmtree(preparation.scratch)
        note_digests(partial, digests)
        samples = read_back(partial, len(entries))
        (partial / REFUSED).write_text(
            "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in refused),
            encoding="utf-8",
        )
    kept = {media for entry in entries for media in entry.media}
    return Summary(
        output=config.output, kept=len(entries), refused=tuple(refused), samples=samples,
        shards=len(shards), shared_media=count_shared_media(shards, parts),
        notes=tuple(preparation.notes.lines()),
        media=dict(Counter(media.kind for media in kept)),
    )  # fmt: skip


@dataclass
class _Preparation:
    """Entries on their way: usable so far, or refused."""

    config: PrepareConfig
    source: RawSource
    scratch: Path  # for media that entries carry themselves
    entries: list[Entry] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    places: list[tuple[str, str]] = field(default_factory=list)  # of every entry read
    misfit: object = None  # the first entry that is not of the format
    notes: Notes = field(init=False)

    def __post_init__(self) -> None:
        self.notes = Notes(templated=self.config.lengths is not None)

    def read(self) -> None:
        """The entries whose text is usable and whose media are there."""
        self.scratch.mkdir()
        # Absolute paths may lie under --media-root while others are relative to the JSON.
        roots = filter(None, (self.config.media_root, self.source.root))
        library = Library(roots, self.scratch,
                          prefers_frames=self.source.format == "chatml")
        shown = show_progress(
            self.source.entries(), self.source.count(), "reading", self.config.progress
        )
        for file, number, where, entry in shown:
            self.places.append((str(file), where))
            name = entry.get("id") if isinstance(entry, dict) else None
            name = None if name is None else str(name)
            try:
                if isinstance(entry, BadEntry):
                    raise entry
                conversation = self.source.read(entry)
                if self.config.marks == "strict":
                    _check_marks(conversation)
                media = tuple(library.locate(source) for source in conversation.media)
            except BadEntry as error:
                if self.misfit is None and error.reason in SHAPES:
                    self.misfit = entry
                self._refuse(number, name, error)
                continue
            self.notes.add(number, conversation, f"{where} of {file.name}")
            self.entries.append(Entry(
                number=number, name=name, turns=conversation.turns, media=media,
                settings=tuple(source.settings for source in conversation.media),
                paths=tuple(source.path for source in conversation.media),
                tools=conversation.tools,
            ))
        self.notes.check(self.entries)

    def measure(self) -> dict[RawMedia, Measured]:
        """Measure every image and video; entries with one that cannot be decoded are refused."""
        media = sorted({m for entry in self.entries for m in entry.media}, key=lambda m: m.files)
        results = dict(show_progress(
            measure_all(media, num_workers=self.config.num_workers), len(media), "checking media",
            self.config.progress,
        ))

        def problem(entry: Entry) -> BadEntry | None:
            for media in entry.media:
                if isinstance(results[media], str):
                    return BadEntry(
                        "unusable media", f"its {media} is unusable: {results[media]}"
                    )
            return _unlike_settings(entry, results)

        self._keep_where(problem)
        measurements = {
            media: told for media, told in results.items() if isinstance(told, Measured)
        }
        self._place_boxes(measurements)
        return measurements

    def _place_boxes(self, sizes: dict[RawMedia, Measured]) -> None:
        """Give boxes in pixels their images' sizes; entries with one outside are refused."""
        entries, self.entries = self.entries, []
        for entry in entries:
            infos = [sizes[one].info for one in entry.media]
            try:
                turns = measured(entry.turns, [(info.width, info.height) for info in infos])
            except BadEntry as error:
                self._refuse(entry.number, entry.name, error)
            else:
                self.entries.append(replace(entry, turns=turns))

    def refuse_long(self, sizes: dict[RawMedia, Measured]) -> None:
        """Refuse entries of more tokens than `max_length`, as the model's tokenizer counts."""
        counter = self.config.lengths

        def problem(entry: Entry) -> BadEntry | None:
            try:
                length = counter.num_tokens(
                    entry.turns, store(entry, sizes)[0], entry.tools
                )
            except BadEntry as error:
                return error
            if length > self.config.max_length:
                return BadEntry(
                    "too long", f"it has {length} tokens, above {self.config.max_length}"
                )
            return None

        self._keep_where(problem, "counting tokens")

    def result(self) -> tuple[list[Entry], list[Refusal]]:
        """What is kept and what is not, in the order of the source.

        Raises:
            InputError: nothing is usable, or `strict` and not everything is.
        """
        refused = sorted(self.refused, key=lambda refusal: refusal.entry)
        total, where = len(self.places), ", ".join(map(str, self.source.files[:3]))
        if not self.entries:
            raise InputError(f"none of the {total} entries of {where} can be used{self._why()}.")
        if refused and self.config.strict:
            raise InputError(
                f"{len(refused)} of {total} entries of {where} cannot be used, the first "
                f"({refused[0].where} of {refused[0].file}) because {refused[0].message}; "
                f"{MENDS[refused[0].reason]}, or prepare without --strict."
            )
        return self.entries, refused

    def _why(self) -> str:
        """Why nothing is usable: every reason, and the format in which it would be."""
        others = []
        if isinstance(self.misfit, dict):
            others = other_formats(self.misfit, self.source.format, self.source.fields)
        reasons = Counter(refusal.reason for refusal in self.refused)
        if others and reasons.most_common(1)[0][0] in SHAPES:
            return (
                f" as {self.source.format}, but some can be read with --format "
                f"{' or '.join(others)}"
            )
        return "".join(f": {line}" if not at else f"; and {line}" for at, line in
                       enumerate(counted(self.refused)))

    def key(self, entry: Entry) -> str:
        """Unique, and in the source's order; energon cuts keys at dots, tar at slashes."""
        width = len(str(len(self.places) - 1))
        text = re.sub(r"[^A-Za-z0-9_-]+", "-", entry.name)[:64] if entry.name is not None else ""
        return f"{entry.number:0{width}d}" + (f"-{text}" if text else "")

    def _keep_where(
        self, problem: Callable[[Entry], BadEntry | None], what: str | None = None
    ) -> None:
        """Refuse the entries that have a problem; `what` is being done, where that takes long."""
        kept = []
        progress = self.config.progress and what is not None
        for entry in show_progress(self.entries, len(self.entries), what, progress):
            found = problem(entry)
            if found is None:
                kept.append(entry)
            else:
                self._refuse(entry.number, entry.name, found)
        self.entries = kept

    def _refuse(self, number: int, name: str | None, error: BadEntry) -> None:
        """Lone surrogates are escaped: what is refused must be writable."""
        self.notes.drop(number)
        file, where = self.places[number]
        name, message = (
            None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")
            for text in (name, str(error))
        )
        self.refused.append(Refusal(
            file=file, where=where, entry=number, id=name, reason=error.reason, message=message,
        ))


def _unlike_settings(entry: Entry, sizes: dict[RawMedia, Measured]) -> BadEntry | None:
    """What a video lacks that its entry asks for, whatever a run's own limits are."""
    for media, settings in zip(entry.media, entry.settings, strict=True):
        if settings is None or media.kind != VIDEO:
            continue
        info = sizes[media].info
        try:
            settings.frames(info.num_frames, info.fps, MediaLimits(), FRAMES_A_PATCH)
        except ValueError as error:
            return BadEntry("unusable media", f"its {media} cannot be as it asks: {error}")
    return None


def _check_marks(conversation: Conversation) -> None:
    """Raises BadEntry: a medium without a mark, or a mark without a medium."""
    if conversation.unmarked:
        raise BadEntry(
            "mark count",
            f"{conversation.unmarked} of its images and videos have no mark; write <image> or "
            f"<video> where each stands, or leave out --marks strict",
        )
    if conversation.marks_as_text:
        raise BadEntry(
            "mark count",
            f"it has no image or video for {conversation.marks_as_text} marks; write them "
            f"otherwise where text is meant, such as [image], or leave out --marks strict",
        )
