"""A run or a checkpoint of any layout as the Hugging Face directory that answers."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.models.conversion import Described, describe
from megatron_vl.models.registry import family
from megatron_vl.peft.conversion import open_whole
from megatron_vl.weights import convert as work
from megatron_vl.weights.found import is_mcore_directory, no_checkpoint, weights_mark
from megatron_vl.weights.hf_io import is_hf_directory
from megatron_vl.weights.hub import local_model
from megatron_vl.weights.targets import HFTarget

EXPORTS = ".hf"  # of a checkpoint: what was exported of it
_KEY = ".exported_from"  # in an export: what tells its checkpoint from others
_SHARD_BYTES = 5 * 10**9


def find_checkpoint(model: Path) -> Path:
    """The Hugging Face directory or the checkpoint that `model` is or, as a run's output, holds in
    `checkpoint` or `checkpoint/NAME`.

    Raises:
        InputError: none, or several to choose from.
    """
    if is_mcore_directory(model) or is_hf_directory(model):
        return model
    saved = model / "checkpoint"
    if is_mcore_directory(saved):
        return saved
    found = [one for one in sorted(saved.glob("*/")) if is_mcore_directory(one)]
    if len(found) != 1:
        raise no_checkpoint(model, "either")
    return found[0]


def hf_directory(
    model: Path, *, export: Path | None = None, hf_config: Path | None = None,
    say: Callable[[str], object],
) -> Path:
    """`find_checkpoint` as a Hugging Face directory: a checkpoint's latest iteration is exported
    once, and found again by where it lies, its iteration and its weights' fingerprints.

    Args:
        model: or its name on a hub: see `local_model`.
        export: where to; None: in the checkpoint's folder EXPORTS, or, where that cannot be
            written, in the user's cache.
        hf_config: holds config.json and the tokenizer of a checkpoint that has none beside it.
        say: told in a line what is exported, or reused.

    Raises:
        InputError: no checkpoint, or one that cannot be exported.
    """
    model = find_checkpoint(local_model(model))
    if not is_mcore_directory(model):
        if given := next((name for name, value in (("export", export), ("hf-config", hf_config))
                          if value is not None), None):
            raise InputError(f"--{given} is for a Megatron-Core checkpoint, but {model} is a "
                             f"Hugging Face directory; leave it out.")
        return model
    whole = model.absolute().parent
    if hf_config is None and not (model / "config.json").is_file() and is_mcore_directory(whole):
        hf_config = whole  # it is one iteration of that
    found = describe(model, hf_config)
    iteration = found.info.path.name
    marks = [str(found.info.path.resolve()), weights_mark(found.info.path)]
    if found.info.adapter is not None and (base := Path(found.info.adapter["base"])).is_dir():
        marks.append(weights_mark(base))
    key = hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:12]
    target = export or _cache(found.info.root) / f"{iteration}-{key}"
    with _alone(target):
        if is_hf_directory(target) and _key_of(target) == key:
            say(f"{target} is {iteration} of {found.info.root}, exported before")
            return target
        if export is not None and _key_of(export) is None and export.exists() and (
            not export.is_dir() or any(export.iterdir())
        ):
            raise InputError(f"{export} holds something else than an export of a checkpoint; give "
                             f"--export another directory.")
        _export(found, model, target, key)
    say(f"exported {iteration} of {found.info.root} to {target}, which later calls reuse; remove "
        f"it when you no longer ask")
    return target


def _export(found: Described, model: Path, target: Path, key: str) -> None:
    weights = family(found.spec.model_type).weight_map(found.spec)
    source, target_kind = open_whole(
        model, found.info, weights, HFTarget(max_shard_bytes=_SHARD_BYTES)
    )
    conversion = work.plan_conversion(source, weights, target_kind)
    with work.progress_bar(conversion.nbytes, "export") as progress:
        work.run_conversion(
            conversion, target, side_files=found.config_dir, overwrite=True, progress=progress
        )
    (target / _KEY).write_text(key + "\n", encoding="utf-8")


def _key_of(target: Path) -> str | None:
    try:
        return (target / _KEY).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _cache(root: Path) -> Path:
    """A checkpoint's folder of exports; the user's cache where that cannot be written."""
    beside = root / EXPORTS
    there = beside if beside.exists() else root
    if os.access(there, os.W_OK | os.X_OK):
        return beside
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "megatron_vl" / "exports"


@contextmanager
def _alone(target: Path):
    """While one process exports to `target`, another that wants the same waits."""
    lock = target.with_name(f".{target.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise InputError(
            f"{target} cannot be written ({error}); give --export another directory."
        ) from error
    with file:
        with suppress(OSError):  # a file system without locks: two exports replace one another
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
