"""What an option of a run is made of."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any


def option(default: Any, help: str, *, choices: tuple | None = None, kind: type | None = None):
    """A field with its help text, the values it may take and, where the default does not tell it,
    its type. A default that is a tuple stands for one or several values of `kind`."""
    return field(default=default, metadata={"help": help, "choices": choices, "kind": kind})


def defaults(owner: type) -> dict[str, Any]:
    """The default of every field of a dataclass, by name."""
    return {one.name: one.default for one in fields(owner)}
