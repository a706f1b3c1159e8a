"""Whether a run that goes on is the one that the command means: of the same model and beginning."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.models.registry import load_spec
from megatron_vl.typed import Shape, Text, read_file
from megatron_vl.weights.found import weights_mark

BEGINNING = "began_with.json"  # in SAVE


class Beginning(Shape):
    """BEGINNING: what a run was first started with."""

    load: Text  # an absolute path
    weights: dict[Text, Text]  # see `weights_mark`


def check_same_model(save: Path, load: Path, *, again: bool = False) -> None:
    """A run that goes on from SAVE does not read `load`, which must not be another model then, nor
    other weights than the run began with.

    Args:
        again: it reads `load` all the same, as an adapter's run does; its weights may have changed
            where they lie.

    Raises:
        InputError: it is.
    """
    if os.path.realpath(load) == os.path.realpath(save) or not all(
        (one / "config.json").is_file() for one in (save, load)
    ):
        return
    mine, other = (replace(load_spec(one), dtype="float32") for one in (save, load))
    if mine != other:
        parts = [(f"{one} ", getattr(mine, one), getattr(other, one))
                 for one in ("decoder", "vision") if getattr(mine, one) and getattr(other, one)]
        names = [f"{part}{f.name} {getattr(a, f.name)} and {getattr(b, f.name)}"
                 for part, a, b in parts for f in fields(a)
                 if getattr(a, f.name) != getattr(b, f.name)]
        if mine.model_type != other.model_type:
            names = [f"model_type {mine.model_type} and {other.model_type}"]
        raise InputError(
            f"--save {save} holds checkpoints of another model than --load {load} "
            f"({names[0] if names else 'their token ids differ'}); a run goes on from --save, so "
            f"give another --save, or leave out --load."
        )
    began = _beginning(save)
    if began is None or (not again
                         and os.path.realpath(began.load) == os.path.realpath(load)):
        return
    now = weights_mark(load)
    # Of another format, or another iteration, they have other names and cannot be compared.
    if now.keys() == began.weights.keys() and now != began.weights:
        had = "had" if os.path.realpath(began.load) == os.path.realpath(load) else "has"
        mend = ("its adapter is of those, so bring them back, or give another --save" if again else
                "a run goes on from --save, so give another --save, or leave out --load")
        raise InputError(
            f"--save {save} holds a run that began with --load {began.load}, which {had} other "
            f"weights than --load {load}; {mend}."
        )


def _beginning(save: Path) -> Beginning | None:
    """None where it is not known: it is a note, and no run depends on it."""
    try:
        return read_file(save / BEGINNING, Beginning, mend="")
    except InputError:
        return None
