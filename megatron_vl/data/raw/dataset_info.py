"""LLaMA-Factory's dataset_info.json: the datasets of a directory, and how each is read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_vl.data.raw.formats import Fields
from megatron_vl.errors import InputError, shown
from megatron_vl.typed import Shape, Text, read_file, typed

NAME = "dataset_info.json"
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
_TAGS = tuple(field.name for field in fields(Fields) if field.name.endswith("_tag"))
_COLUMNS = tuple(field.name for field in fields(Fields) if field.name not in _TAGS)
# Key of an entry -> why it cannot be followed. Some are followed where they say nothing special.
_HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name")
_PREFERENCES = ("chosen", "rejected", "kto_tag")
_UNREAD_COLUMNS = {"audios": "audio"}
_KNOWN = (
    "file_name", "formatting", "columns", "tags", "ranking", "script_url", "subset", "split",
    "folder", "num_samples", "revision", *_HUBS,
)  # fmt: skip


class _Entry(Shape):
    """What of a dataset's entry is followed."""

    file_name: Text | None = None
    formatting: Text | None = None
    columns: dict[Text, Text | None] | None = None
    tags: dict[Text, Text | None] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """One dataset of a dataset_info.json."""

    format: str  # one of `FORMATS`
    fields: Fields
    path: Path  # the file with its entries, or the directory of its files


def read_dataset_info(directory: Path, name: str) -> DatasetInfo:
    """The dataset `name` of the dataset_info.json in `directory`.

    Raises:
        InputError: no such file or name, or a dataset that cannot be read as it asks.
    """
    path = directory / NAME
    datasets = _read(path)
    if name not in datasets:
        raise InputError(
            f"{path} has no dataset {shown(repr(name))}; {_choices(name, datasets)}."
        )
    info, where = datasets[name], f"dataset {shown(repr(name))} of {path}"
    try:
        entry = typed(_Entry, info)
    except ValueError as error:
        raise InputError(f"{where} cannot be read ({error}); correct it.") from error
    _refuse(info, where)
    formatting = entry.formatting or "alpaca"
    if formatting not in _FORMATS:
        raise InputError(
            f"{where} has the formatting {shown(repr(formatting))}; it must be one of: "
            f"{', '.join(_FORMATS)}."
        )
    columns = _names(entry.columns, "columns", (*_COLUMNS, *_PREFERENCES, *_UNREAD_COLUMNS), where)
    for column in _PREFERENCES:
        if column in columns:
            raise InputError(
                f"{where} names the column {column}, but preferences are not trained on; take a "
                f"dataset of questions and answers."
            )
    for column, what in _UNREAD_COLUMNS.items():
        if column in columns:
            raise InputError(
                f"{where} names the column {column}, but {what} cannot be trained on; remove it "
                f"from columns to read the rest."
            )
    tags = _names(entry.tags, "tags", _TAGS, where)
    if not entry.file_name:
        raise InputError(f"{where} has no file_name; give the name of its file.")
    file = directory / entry.file_name
    if not os.path.exists(file):
        raise InputError(f"{shown(file)}, the file_name of {where}, does not exist.")
    return DatasetInfo(
        format=_FORMATS[formatting], path=file,
        fields=Fields(**_unread(columns), **columns, **tags),
    )


def _unread(columns: dict[str, str]) -> dict[str, str]:
    """Columns that LLaMA-Factory does not read, whatever they hold.

    It reads a system prompt and a history only where they are named; and where any column is, only
    those that are. Without the turns, question or answer there would be nothing to read.
    """
    optional = {"system", "history", *(("query", "images", "videos", "tools") if columns else ())}
    if "query" in columns:
        optional.add("prompt")
    return dict.fromkeys(optional - columns.keys(), "")


def dataset_names(directory: Path) -> list[str]:
    """The names in the dataset_info.json of a directory; none where it holds no datasets."""
    try:
        datasets = _read(directory / NAME)
    except InputError:
        return []
    # Hugging Face's save_to_disk writes another file of this name.
    return [k for k, info in datasets.items() if isinstance(info, dict) and "file_name" in info]


def _read(path: Path) -> dict:
    if not os.path.exists(path):
        raise InputError(
            f"{path} does not exist; give the directory that holds it, or no --dataset."
        )
    return read_file(path, dict[Text, Any], mend="check the file", marked=True)


def _refuse(info: dict, where: str) -> None:
    """Refuse what would be read other than it is meant."""
    for key in info:
        close = get_close_matches(key[:80], _KNOWN, n=1, cutoff=0.8)
        if key not in _KNOWN and close:
            raise InputError(
                f"{where} has {shown(repr(key))}; did you mean {close[0]!r}? Correct it."
            )
    if info.get("ranking"):
        raise InputError(
            f"{where} is a preference dataset (ranking), which is not trained on; take a dataset "
            f"of questions and answers."
        )
    if info.get("script_url"):
        raise InputError(
            f"{where} is loaded by a script (script_url), which is not run; write its entries to "
            f"a JSON file and give that as file_name."
        )
    hub = next((key for key in _HUBS if info.get(key)), None)
    if hub is not None and not info.get("file_name"):
        raise InputError(
            f"{where} is not on this machine ({hub}: {shown(info[hub])}); download it and give its "
            f"file as file_name."
        )
    if info.get("num_samples") is not None:
        raise InputError(
            f"{where} asks for num_samples, a random part of it; remove num_samples to read all, "
            f"or write the part to a file of its own."
        )


def _names(
    given: dict[str, str | None] | None, key: str, known: Iterable[str], where: str
) -> dict[str, str]:
    """`columns` or `tags`: known name -> the dataset's own, without those that are null."""
    known, given = tuple(known), given or {}
    for name in given:
        if name not in known:
            raise InputError(
                f"{where} has {shown(repr(name))} in {key}; {_choices(name, known)}."
            )
    return {name: value for name, value in given.items() if value}


def _choices(name: str, names: Iterable[str]) -> str:
    """What `name` may have been meant to be."""
    names = list(names)
    close = get_close_matches(name[:80], names, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    listed = ", ".join(shown(one) for one in names[:20]) + (", ..." if len(names) > 20 else "")
    return f"{meant}it must be one of: {listed}" if listed else "it is empty"
