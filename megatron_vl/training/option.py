"""What an option of a run is made of, and the bounds that several share."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from megatron_vl.errors import InputError


def option(default: Any, help: str, *, choices: tuple | None = None, kind: type | None = None):
    """A field with its help text, the values it may take and, where the default does not tell it,
    its type. A default that is a tuple stands for one or several values of `kind`."""
    return field(default=default, metadata={"help": help, "choices": choices, "kind": kind})


def at_least(options, minimum: int, *names: str) -> None:
    """Refuse a smaller value, and NaN; an option left to its default of None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= minimum:
            raise InputError(
                f"{name.replace('_', '-')} is {value}; it must be at least {minimum}."
            )


def above_zero(options, *names: str) -> None:
    for name in names:
        if not getattr(options, name) > 0:
            raise InputError(
                f"{name.replace('_', '-')} is {getattr(options, name)}; it must be above 0."
            )
