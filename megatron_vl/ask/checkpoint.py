"""A run, a checkpoint of any layout, or a model and an adapter as the Hugging Face directory that
answers."""

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
from megatron_vl.peft.files import adapter_mark
from megatron_vl.peft.merge import open_whole
from megatron_vl.weights import convert as work
from megatron_vl.weights.found import is_mcore_directory, no_checkpoint, weights_mark
from megatron_vl.weights.hf_io import is_hf_directory
from megatron_vl.weights.hub import local_model
from megatron_vl.weights.map import WeightMap
from megatron_vl.weights.targets import HFTarget

EXPORTS = ".hf"  # of a checkpoint, or an adapter: what was exported of it
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
    model: Path, *, adapter: Path | None = None, base: Path | None = None,
    export: Path | None = None, hf_config: Path | None = None, say: Callable[[str], object],
) -> Path:
    """`find_checkpoint` as a Hugging Face directory: a checkpoint's latest iteration, or a model
    with an adapter merged, is exported once, and found again by where it lies, its iteration and
    its weights' fingerprints.

    Args:
        model: or its name on a hub: see `local_model`.
        adapter: of PEFT's, for the model.
        base: the model that a checkpoint's adapter is beside; None: where its run found it.
        export: where to; None: in the folder EXPORTS of the adapter or the checkpoint, or, where
            that cannot be written, in the user's cache.
        hf_config: holds config.json and the tokenizer of a checkpoint that has none beside it.
        say: told in a line what is exported, or reused.

    Raises:
        InputError: no checkpoint, or one that cannot be exported.
    """
    model = find_checkpoint(local_model(model))
    if not is_mcore_directory(model):
        needless = {"hf-config": hf_config, "base": base}
        needless |= {} if adapter is not None else {"export": export}
        if given := next((name for name, value in needless.items() if value is not None), None):
            raise InputError(f"--{given} is for a Megatron-Core checkpoint, but {model} is a "
                             f"Hugging Face directory; leave it out.")
        if adapter is None:
            return model
    whole = model.absolute().parent
    if hf_config is None and not (model / "config.json").is_file() and is_mcore_directory(whole):
        hf_config = whole  # it is one iteration of that
    found = describe(model, hf_config)
    path, root = (model, model) if found.info is None else (found.info.path, found.info.root)
    marks = [str(path.resolve()), weights_mark(path)]
    if found.info is not None and found.info.adapter is not None:
        beside = base or Path(found.info.adapter["base"])
        marks += [weights_mark(beside)] if beside.is_dir() else []
    what, name, place = f"{path.name} of {root}", path.name, root
    if adapter is not None:
        marks.append(adapter_mark(adapter))
        what, name, place = f"{model} with {adapter}", "merged", adapter
    key = hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:12]
    target = export or _cache(place) / f"{name}-{key}"
    with _alone(target):
        if is_hf_directory(target) and _key_of(target) == key:
            say(f"{target} is {what}, exported before")
            return target
        if export is not None and _key_of(export) is None and export.exists() and (
            not export.is_dir() or any(export.iterdir())
        ):
            raise InputError(f"{export} holds something else than an export of a checkpoint; give "
                             f"--export another directory.")
        weights = family(found.spec.model_type).weight_map(found.spec)
        source = open_whole(model, found.info, weights, base=base, adapter=adapter)
        _export(found, source, weights, target, key)
    say(f"exported {what} to {target}, which later calls reuse; remove it when you no longer ask")
    return target


def _export(
    found: Described, source: work.Source, weights: WeightMap, target: Path, key: str
) -> None:
    conversion = work.plan_conversion(source, weights, HFTarget(max_shard_bytes=_SHARD_BYTES))
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
    """The folder of exports in `root`; the user's cache where that cannot be written."""
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
