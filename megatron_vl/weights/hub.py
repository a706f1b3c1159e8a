"""A model by its name on a hub, `Qwen/Qwen2-VL-2B-Instruct`: where its files are on this machine.

A directory of that name comes first, then the caches of Hugging Face and ModelScope as their own
libraries lay them out. What is in neither is downloaded by these libraries.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from megatron_vl.errors import InputError, shown
from megatron_vl.weights.hf_io import INDEXES, SIDE_FILES, weight_files

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*?)(?:@(\w[\w./-]*))?", re.ASCII)  # with a revision
_WEIGHTS = (("*.safetensors", INDEXES[0]), ("pytorch_model*.bin", INDEXES[1]))  # the first found


@functools.cache
def local_model(given: str | Path, *, weights: bool = True) -> Path:
    """The directory of a model: `given` itself, unless it is the name of a model on a hub.

    Where a name leads to is printed, but by the ranks of a job. What is cached is taken as it is,
    without asking the hub for a newer one.

    Args:
        given: a path, or OWNER/NAME or OWNER/NAME@REVISION.
        weights: whether they are needed too, or only the files beside them.

    Raises:
        InputError: a name that is in no cache, or not whole there, and cannot be downloaded.
    """
    match = _NAME.fullmatch(str(given))
    if match is None or os.path.lexists(given):
        return Path(given)
    name, revision = match.groups()
    found = _in_hf_cache(name, revision) or _in_modelscope_cache(name, revision)
    lacks = "" if found is None else _lacks(found, weights)
    if found is None and Path(given).parent.is_dir():
        return Path(given)  # a path with a slip in it; whoever reads it says so
    if found is None or lacks:
        found = _downloaded(str(given), weights, lacks)
    if "LOCAL_RANK" not in os.environ:
        print(f"{given} is {found}", flush=True)
    return found


def _in_hf_cache(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _in_modelscope_cache(name: str, revision: str | None) -> Path | None:
    """As `modelscope_hub` looks it up, of its own form and the one of releases before 1.38."""
    root = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope")
    snapshots = root / "models" / name.replace("/", "--") / "snapshots"
    forms = [snapshots / one for one in ([revision] if revision else ["master", "main"])]
    if revision is None:  # which the older form does not know
        owner, model = name.split("/")
        forms += [root / base / owner / model.replace(".", "___")
                  for base in ("models", "hub/models")]
    return next((form for form in forms if form.is_dir()), None)


def _lacks(directory: Path, weights: bool) -> str:
    """What is missing of a model, in a sentence; empty if nothing is."""
    if not (directory / "config.json").is_file():
        return f"{directory} has no config.json."
    try:
        if weights:
            weight_files(directory)
    except InputError as error:
        return str(error)
    return ""


def _downloaded(given: str, weights: bool, lacks: str) -> Path:
    """From Hugging Face, or else from ModelScope where its library is installed.

    Both lock the files that they write: of several processes one downloads a file.
    """
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    name, revision = _NAME.fullmatch(given).groups()
    here = f"is not whole in the cache: {lacks.rstrip('.')}" if lacks else (
        f"is no directory here, and neither in Hugging Face's cache {HF_HUB_CACHE} nor in "
        f"ModelScope's")
    if HF_HUB_OFFLINE:
        raise InputError(
            f"{given} {here}; HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or give "
            f"the model's directory."
        )
    failed = []
    for hub, download in _hubs().items():
        try:
            for files in (SIDE_FILES, *(_WEIGHTS if weights else ())):
                found = Path(download(name, revision=revision, allow_patterns=list(files),
                                      ignore_patterns=["*/*"]))
                lacks = _lacks(found, weights)
                if not lacks:
                    return found
            failed.append(f"{hub}: {lacks.rstrip('.')}")
        except Exception as error:  # each library has kinds of its own
            why = str(error.__cause__ or error).strip().partition("\n")[0]
            failed.append(f"{hub}: {shown(why)}")
    raise InputError(
        f"{given} {here}; it cannot be downloaded ({'; '.join(failed)}): give the model's "
        f"directory, or its right name."
    )


def _hubs() -> dict[str, Callable[..., str]]:
    """What downloads a model from each hub whose library is installed."""
    from huggingface_hub import snapshot_download

    hubs: dict[str, Callable[..., str]] = {"Hugging Face": snapshot_download}
    if find_spec("modelscope"):
        from modelscope import snapshot_download as from_modelscope

        hubs["ModelScope"] = from_modelscope
    return hubs
