"""The whole of it: read, look, count, forecast, draw, write."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vl.data.lint.look import Look, Looker, build_encoder
from megatron_vl.data.lint.numbers import summarize
from megatron_vl.data.lint.page import write_page
from megatron_vl.data.lint.plots import draw
from megatron_vl.data.lint.reading import choose, open_leaves
from megatron_vl.data.lint.tables import as_text, headline, notes, tables
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.options import TrainedText
from megatron_vl.data.raw.shards import show_progress
from megatron_vl.errors import Bounds, CheckFailed, InputError
from megatron_vl.models.family import Family
from megatron_vl.models.media import MediaLimits
from megatron_vl.models.spec import ModelSpec
from megatron_vl.outputs import check_target, replacing

NUMBERS, PAGE = "lint.json", "lint.html"
FILES = {NUMBERS, PAGE, *(f"{name}.png" for name in ("tokens", "patches", "images", "sizes",
                                                      "rows"))}


@dataclass(frozen=True, kw_only=True, slots=True)
class LintConfig:
    """What to look at, and how.

    Raises:
        InputError: options that cannot be used, or not together.
    """

    data: Mixture
    hf_dir: Path | None = None  # whose tokenizer and image settings count; None: no tokens
    spec: ModelSpec | None = None  # of that model
    family: Family | None = None
    split: str = "train"
    samples: int = 2000  # looked at; 0: all
    seq_length: int = 2048  # tokens of a row
    max_patches_per_row: int | None = None
    media: MediaLimits = field(default_factory=MediaLimits)
    trained: TrainedText = field(default_factory=TrainedText)
    decode: bool = False  # decode every image and video of the samples looked at
    output: Path | None = None  # the report's directory; None: see `target`
    strict: bool = False  # a refused sample fails the check
    seed: int = 1234
    progress: bool = True

    def __post_init__(self) -> None:
        Bounds(least=0, most=10**12).check("samples", self.samples)
        if self.decode and self.hf_dir is None:
            raise InputError("decode needs the model's image settings; give --model too.")
        self.rows  # noqa: B018  (raises for bad sizes)

    @property
    def rows(self) -> DataConfig:
        """As training is told."""
        return DataConfig(
            train=self.data, seq_length=self.seq_length, media=self.media, trained=self.trained,
            max_patches_per_row=self.max_patches_per_row, seed=self.seed,
        )

    @property
    def target(self) -> Path:
        """The directory asked for; else one that is not there yet, beside the first dataset."""
        if self.output is not None:
            return self.output
        paths = [Path(os.path.abspath(path)) for path in self.data.paths]
        names = [path.stem if path.is_file() else path.name for path in paths]
        # A dataset that others share may lie where only they write.
        folder = paths[0].parent if os.access(paths[0].parent, os.W_OK) else Path.cwd()
        name = f"{'+'.join(names)[:100]}-lint"
        number = 1
        while os.path.lexists(target := folder / (f"{name}-{number}" if number > 1 else name)):
            number += 1
        return target


def lint(config: LintConfig) -> str:
    """Write the report of `config`; returns what to print of it.

    Raises:
        InputError: a dataset, model or output that cannot be used.
        CheckFailed: a sample is refused, and the config is strict.
    """
    leaves = open_leaves(config.data, config.split)
    target = config.target
    _check_output(target, [*(leaf.path for leaf in leaves), *config.data.paths,
                           *([config.hf_dir] if config.hf_dir else []), Path.cwd()])
    encoder = build_encoder(config.rows, config.hf_dir, config.spec, config.family,
                            split=config.split)
    looker = Looker(leaves, encoder, decode=config.decode)
    with replacing(target) as folder:
        looks = _look(looker, list(choose(leaves, config.samples, seed=config.seed)),
                      config.progress)
        numbers = summarize(leaves, looks, config.rows, split=config.split, seed=config.seed,
                            progress=config.progress)
        numbers |= {"model": config.hf_dir and str(config.hf_dir), "decoded": config.decode}
        captions = draw(looks, numbers, folder)
        write_page(folder / PAGE, numbers, looks, looker, captions, seed=config.seed)
        (folder / NUMBERS).write_bytes(
            # A name or message may hold half a character, which UTF-8 cannot write.
            json.dumps(numbers, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace")
        )
    words = "\n\n".join(map(as_text, tables(numbers)))
    lines = [headline(numbers), *(f"- {note}" for note in notes(numbers))]
    report = f"{words}\n\n" + "\n".join(lines) + f"\n{target / PAGE}"
    refused = numbers["looked_at"] - numbers["usable"]
    if config.strict and refused:
        print(report)
        raise CheckFailed(
            f"{refused} of {numbers['looked_at']} samples cannot be used; see {target / PAGE}."
        )
    return report


def _look(looker: Looker, chosen: list[tuple[int, int]], progress: bool) -> list[Look]:
    shown: Iterable = show_progress(chosen, len(chosen), "looking", progress)
    return [look for place in shown if (look := looker.look(*place)) is not None]


def _check_output(target: Path, needed: list[Path]) -> None:
    """A report may be replaced; a directory with anything else in it never is."""
    with contextlib.suppress(OSError):  # what cannot be looked at is told below
        if target.is_dir() and any(target.iterdir()) and not _is_report(target):
            raise InputError(f"{target} holds more than a lint report; choose another with --out.")
    check_target(target, overwrite=True, needed=needed, is_ours=_is_report, what="lint report")


def _is_report(folder: Path) -> bool:
    """Raises OSError: it cannot be looked at."""
    names = {path.name for path in folder.iterdir()}
    return NUMBERS in names and names <= FILES
