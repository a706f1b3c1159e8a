"""LLaMA-Factory's dataset_info.json: the datasets of a directory, and how each is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from megatron_vl.data.formats import Fields
from megatron_vl.data.source_files import not_utf8
from megatron_vl.errors import InputError

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
        raise InputError(f"{path} has no dataset {name!r}; {_choices(name, datasets)}.")
    info, where = datasets[name], f"dataset {name!r} of {path}"
    if not isinstance(info, dict):
        raise InputError(f"{where} is no object; give it a file_name, formatting and columns.")
    _refuse(info, where)
    formatting = info.get("formatting") or "alpaca"
    if not isinstance(formatting, str) or formatting not in _FORMATS:
        raise InputError(
            f"{where} has the formatting {formatting!r}; it must be one of: {', '.join(_FORMATS)}."
        )
    columns = _names(info, "columns", (*_COLUMNS, *_PREFERENCES, *_UNREAD_COLUMNS), where)
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
    tags = _names(info, "tags", _TAGS, where)
    file_name = info.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise InputError(f"{where} has no file_name; give the name of its file.")
    if not (directory / file_name).exists():
        raise InputError(f"{directory / file_name}, the file_name of {where}, does not exist.")
    return DatasetInfo(
        format=_FORMATS[formatting], path=directory / file_name,
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
    data = b""
    try:
        data = path.read_bytes()
        datasets = json.loads(data.decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist; give the directory that holds it, or no --dataset."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} {not_utf8(data)}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); check the file.") from error
    if not isinstance(datasets, dict):
        raise InputError(f"{path} is no object of datasets; check the file.")
    return datasets


def _refuse(info: dict, where: str) -> None:
    """Refuse what would be read other than it is meant."""
    for key in info:
        close = get_close_matches(key, _KNOWN, n=1, cutoff=0.8) if key not in _KNOWN else []
        if close:
            raise InputError(f"{where} has {key!r}; did you mean {close[0]!r}? Correct it.")
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
            f"{where} is not on this machine ({hub}: {info[hub]}); download it and give its file "
            f"as file_name."
        )
    if info.get("num_samples") is not None:
        raise InputError(
            f"{where} asks for num_samples, a random part of it; remove num_samples to read all, "
            f"or write the part to a file of its own."
        )


def _names(info: dict, key: str, known: Iterable[str], where: str) -> dict[str, str]:
    """`columns` or `tags`: known name -> the dataset's own, without those that are null."""
    given = info.get(key) or {}
    if not isinstance(given, dict):
        raise InputError(f'{where} has {key} that are no object; give {{"name": "its name"}}.')
    known = tuple(known)
    for name, value in given.items():
        if name not in known:
            raise InputError(f"{where} has {name!r} in {key}; {_choices(name, known)}.")
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where} has the {key} {name}: {value!r}; give its name as text.")
    return {name: value for name, value in given.items() if value}


def _choices(name: str, names: Iterable[str]) -> str:
    """What `name` may have been meant to be."""
    names = list(names)
    close = get_close_matches(name, names, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"{meant}it must be one of: {shown}" if shown else "it is empty"
