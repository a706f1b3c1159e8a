"""What lies in a directory that was given for a checkpoint, and what to type instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

from megatron_vl.errors import InputError, shown
from megatron_vl.inputs import read_text
from megatron_vl.weights.files import fingerprint
from megatron_vl.weights.hf_io import WEIGHT_FILES, is_hf_directory

LATEST = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # the word in it, and the folder's name, of a converted checkpoint
Wanted = Literal["hf", "mcore", "either"]
KINDS = {"hf": "a Hugging Face directory with weights", "mcore": "a Megatron-Core checkpoint",
         "either": "a Hugging Face or Megatron-Core checkpoint"}
_DEPTH, _MOST = 3, 2000  # how far below, and how many folders, a checkpoint is looked for


def no_checkpoint(path: Path, wanted: Wanted) -> InputError:
    """The error that says what `path` is instead of what was wanted, and how to go on."""
    what, mend = _look(path, wanted)
    return InputError(f"{path} {what}; {mend}.")


def no_config(path: Path) -> InputError:
    """The error that says what a directory without config.json is, and how to go on."""
    needed = "the model's config.json"
    above = path.absolute().parent
    if is_mcore_directory(path):
        what = f"is a Megatron-Core checkpoint without {needed}"
        mend = "copy it and the tokenizer's files there, or give --hf-config the directory of them"
        if (above / LATEST).is_file() and (above / "config.json").is_file():
            what, mend = f"is one iteration of the checkpoint {above}", f"give {above}"
        return InputError(f"{path} {what}; {mend}.")
    if path.is_dir() and ((path / "adapter_config.json").is_file() or (path / ".nv-meta").is_dir()
                          or any(_below(path, "either"))):
        return no_checkpoint(path, "either")
    return InputError(f"{path} has no config.json; give a directory that has the model's own one.")


def others(path: Path) -> str | None:
    """What a directory is that no run may write its checkpoints into; None where one may."""
    if (path / ".nv-meta").is_dir():
        return "a prepared dataset"
    if is_hf_directory(path) and not is_mcore_directory(path):
        return "a Hugging Face directory with weights"
    return None


def _look(path: Path, wanted: Wanted) -> tuple[str, str]:
    give = f"give {KINDS[wanted]}"
    if not path.exists():
        return "does not exist", give
    if not path.is_dir():
        return "is a file", f"{give}: the directory"
    if (path / "adapter_config.json").is_file():
        return ("is a LoRA adapter, without the weights it belongs to",
                "merge it into its model first (megatron-vl convert MODEL MERGED --merge --adapter "
                f"{path}), and give MERGED")
    if is_mcore_directory(path):
        return ("is a Megatron-Core checkpoint",
                f"{give}; megatron-vl convert {path} HF_DIR makes one of it")
    if path.name.startswith("mp_rank_"):
        return "is one rank's part of a Megatron-Core checkpoint", f"give {_above(path)}"
    if is_hf_directory(path):
        return ("is a Hugging Face directory",
                f"{give}; megatron-vl convert {path} CHECKPOINT --tp TP --pp PP makes one of it")
    if (path / ".nv-meta").is_dir():
        return "is a prepared dataset", give
    below = list(islice(_below(path, wanted), 3))
    if below:
        return "holds checkpoints in folders of its own", f"give one of them: {', '.join(below)}"
    if (path / "config.json").is_file():
        return "has a config.json but no weights", give
    return (f"is no checkpoint: it has neither config.json with weights nor {LATEST}", give)


def weights_mark(path: Path) -> dict[str, str]:
    """What tells the weights in a checkpoint from others: the fingerprint of each of their files,
    by its name. Of several iterations the latest counts.

    Raises:
        InputError: LATEST says none that is there.
        OSError: a file cannot be read.
    """
    if is_mcore_directory(path):
        root = path
        if (path / LATEST).is_file():
            iteration = latest(path)
            root = path / (RELEASE if iteration is None else f"iter_{iteration:07d}")
        files = [*root.glob("mp_rank_*/*.pt"), *root.glob("*.distcp")]
    else:
        files = [file for pattern in WEIGHT_FILES for file in path.glob(pattern)]
    return {str(file.relative_to(path)): fingerprint(file) for file in sorted(files)}


def iterations(root: Path) -> list[int]:
    """Of the complete checkpoints, in order."""
    found = (re.fullmatch(r"iter_(\d{7,15})", one.name, re.ASCII) for one in root.glob("iter_*"))
    return sorted(int(match[1]) for match in found if match)


def latest(root: Path) -> int | None:
    """The iteration that `root`'s LATEST says, which is there; None: RELEASE.

    Raises:
        InputError: it cannot be read, or says none that is there.
    """
    path = root / LATEST
    there = {str(one): one for one in iterations(root)}
    if (root / RELEASE).is_dir():
        there[RELEASE] = None
    has = ", ".join(there) or "no iteration at all"
    try:
        text = read_text(path).strip()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}) and {root} has {has}; write one of these into it."
        ) from error
    # Zeros before a number are some people's way to write it.
    number = text.lstrip("0") or text[:1]
    if re.fullmatch(r"\d{1,15}", number, re.ASCII) and (root / f"iter_{int(number):07d}").is_dir():
        return int(number)  # which a network file system may show before it lists it
    if number not in there:
        raise InputError(
            f"{path} says {shown(repr(text))} but {root} has {has}; write one of these into it."
        )
    return there[number]


def is_mcore_directory(path: Path) -> bool:
    """Whether it looks like a Megatron-Core checkpoint, or one iteration of it."""
    return (path / LATEST).is_file() or mcore_format(path) is not None


def mcore_format(path: Path) -> str | None:
    """ "torch_dist" or "torch", of one iteration; None of anything else."""
    if (path / ".metadata").is_file():
        return "torch_dist"
    return "torch" if any(path.glob("mp_rank_*")) else None


def _above(rank: Path) -> Path:
    """The directory of the checkpoint, or else of the iteration, that a rank's part is of."""
    root = rank.absolute().parent.parent
    return root if (root / LATEST).is_file() else rank.absolute().parent


def _below(path: Path, wanted: Wanted) -> Iterator[str]:
    """Checkpoints of the wanted kind in folders of `path`, the nearest first."""
    folders, seen = [path], 0
    for _ in range(_DEPTH):
        deeper = []
        for folder in folders:
            for one in sorted(_folders(folder)):
                seen += 1
                if seen > _MOST:
                    return
                if (wanted != "hf" and is_mcore_directory(one)) or (
                    wanted != "mcore" and is_hf_directory(one)
                ):
                    yield str(one)
                else:
                    deeper.append(one)
        folders = deeper


def _folders(folder: Path) -> list[Path]:
    try:
        return [one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")]
    except PermissionError:
        return []
