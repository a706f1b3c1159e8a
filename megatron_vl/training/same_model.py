"""Whether a run that goes on is the one that the command means: of the same model and beginning."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.models.registry import load_spec
from megatron_vl.typed import Shape, Text, read_file
from megatron_vl.weights.found import weights_mark

OPTIONS = "train_options.yaml"  # in SAVE; every start writes it anew


class _Began(Shape):
    """OPTIONS, as far as it is asked."""

    load: Text | None = None


def check_same_model(save: Path, load: Path) -> None:
    """A run that goes on from SAVE does not read `load`, which must not be another model then, nor
    other weights than the run began with.

    Raises:
        InputError: it is.
    """
    if not all((one / "config.json").is_file() for one in (save, load)):
        return
    mine, other = (replace(load_spec(one), dtype="float32") for one in (save, load))
    if mine != other:
        parts = [(one, getattr(mine, one), getattr(other, one)) for one in ("decoder", "vision")]
        names = [f"{part} {f.name} {getattr(a, f.name)} and {getattr(b, f.name)}"
                 for part, a, b in parts for f in fields(a)
                 if getattr(a, f.name) != getattr(b, f.name)]
        raise InputError(
            f"--save {save} holds checkpoints of another model than --load {load} "
            f"({names[0] if names else 'their token ids differ'}); a run goes on from --save, so "
            f"give another --save, or leave out --load."
        )
    began = _began_with(save)
    if began is None or not began.is_dir() or os.path.realpath(began) == os.path.realpath(load):
        return
    if weights_mark(began) != weights_mark(load):
        raise InputError(
            f"--save {save} holds a run that began with --load {began}, which has other weights "
            f"than --load {load}; a run goes on from --save, so give another --save, or the --load "
            f"that it began with."
        )


def _began_with(save: Path) -> Path | None:
    """What a run was last started with as `load`; None where that is not known."""
    try:
        began = read_file(save / OPTIONS, _Began, mend="").load
    except InputError:
        return None  # it is a note for people, and no run depends on it
    return None if began is None else Path(began)
