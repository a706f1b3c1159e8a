"""Where a TrainConfig's options come from: command line beats environment beats YAML beats default.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from megatron_vl.errors import NO_OPTIONS, OPTIONS, InputError, shown
from megatron_vl.inputs import read_text, yaml_value
from megatron_vl.training.options.config import TrainConfig, kind_of
from megatron_vl.training.options.groups import GROUPS
from megatron_vl.training.options.spellings import PRECISIONS, answer, flags_of, key_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per option, in groups; flags that were not given stay absent from the namespace."""
    for group in GROUPS.values():
        section = parser.add_argument_group(group.__doc__.strip().splitlines()[0])
        for f in fields(group):
            _add_argument(section, f)


def add_some_arguments(parser: argparse.ArgumentParser, group: type, names: Sequence[str]) -> None:
    """The flags of some options of a group, for commands that look at what training would do.

    Flags that were not given stay absent from the namespace.
    """
    for f in fields(group):
        if f.name in names:
            _add_argument(parser, f)


def _add_argument(section: argparse._ActionsContainer, f: Field) -> None:
    flags = flags_of(f.name)
    help_text = f.metadata["help"].replace("%", "%%")
    if kind_of(f) is bool:
        # --no-bf16 beats a file's `bf16: true`; --no-load-optim has no such counterpart.
        negative = f.name.startswith("no_")
        section.add_argument(
            *flags, default=argparse.SUPPRESS, help=help_text + " (default: on)" * bool(f.default),
            action="store_true" if negative else argparse.BooleanOptionalAction,
        )
        return
    assert f.default is not MISSING
    several = isinstance(f.default, tuple)
    default = " ".join(map(str, f.default)) if several else f.default
    shown = "" if default in (None, "") else f" (default: {default})"
    section.add_argument(
        *flags, type=kind_of(f), nargs="+" if several else None,
        choices=f.metadata["choices"], default=argparse.SUPPRESS,
        metavar=None if f.metadata["choices"] else kind_of(f).__name__.upper(),
        help=help_text + shown,
    )


def load_config(
    flags: dict[str, Any], yaml_file: str | None, environ: Mapping[str, str] | None = None
) -> TrainConfig:
    """Defaults, then `yaml_file`, then the environment (default: the process's), then `flags`.

    Raises:
        InputError: an unreadable file, an unknown key or variable, an unusable value.
    """
    return TrainConfig.from_dict(given_options(flags, yaml_file, environ))


def given_options(
    flags: dict[str, Any], yaml_file: str | None, environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The options that are given at all, by name; see `load_config`."""
    values: dict[str, Any] = {}

    def put(given: dict[str, Any]) -> None:
        if any(given.get(name) for name in PRECISIONS):  # instead of another that said it before
            for name in PRECISIONS:
                values.pop(name, None)
        values.update(given)

    if yaml_file is not None:
        path = Path(yaml_file)
        if not os.path.isfile(path):
            raise InputError(
                f"--config {shown(path)} does not exist; give a YAML file of options."
            )
        try:
            read = yaml_value(read_text(path))
        except (OSError, ValueError) as error:
            raise InputError(f"--config {path} is not valid YAML: {error}.") from error
        if not isinstance(read, dict):
            raise InputError(f"--config {path} must hold `option: value` lines.")
        spelled: dict[str, str] = {}
        for key in map(str, read):
            twin = spelled.setdefault(key_of(key), key)
            if twin != key:
                raise InputError(
                    f"--config {path} has both {shown(twin)} and {shown(key)}, which are one "
                    f"option; keep one."
                )
        put({key_of(str(key)): value for key, value in read.items()})
    put(_from_environment(os.environ if environ is None else environ))
    put(flags)
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Options that variables give, their values as YAML has them; an empty one counts as not set.

    Raises:
        InputError: a variable that is no option's, or no YAML.
    """
    known = {f.name: f for group in GROUPS.values() for f in fields(group)}
    values = {}
    for name, text in environ.items():
        if not name.startswith(OPTIONS) or name in NO_OPTIONS or not text:
            continue
        key = key_of(name.removeprefix(OPTIONS).lower())
        if key not in known:
            near = difflib.get_close_matches(key[:80], known, n=1)
            mend = f"did you mean {OPTIONS}{near[0].upper()}?" if near else "unset it."
            says = answer(key)
            raise InputError(
                f"the environment variable {shown(name)} is no option's; "
                f"{f'{says}.' if says else mend}"
            )
        if key in values:
            raise InputError(f"{name} and another environment variable are both {key}; unset one.")
        try:
            values[key] = text if kind_of(known[key]) is str else yaml_value(text)
        except ValueError as error:
            raise InputError(
                f"the environment variable {name} is {shown(repr(text))}, which is no YAML value; "
                f"quote it."
            ) from error
    return values
