"""Published (Hugging Face) weights: where each tensor's bytes lie, and files laid out to be filled.

Reads `model.safetensors` with or without an index, sharded safetensors, and `.bin` pickles, whose
code is not run. A safetensors file is 8 bytes of header length, a JSON header and the
tensors; header and file length are checked against each other before anything is read.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_vl.errors import InputError, shown
from megatron_vl.inputs import json_value
from megatron_vl.pickles import Record
from megatron_vl.typed import Count, Name, Shape, Text, read_file, typed
from megatron_vl.weights.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from megatron_vl.weights.files import TensorAt, reserve
from megatron_vl.weights.map import Stored, listed, volume
from megatron_vl.weights.torch_file import open_torch_file

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
SIDE_FILES = (  # besides weights, what makes a directory loadable
    "config.json", "generation_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "tokenizer*", "chat_template*", "*.tiktoken",
    "*.jinja", "configuration.json", "*.py", "README.md", "LICENSE*",
)
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
MAX_HEADER = 100 * 2**20  # bytes; safetensors' own limit

_DTYPES = {"F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Index(Shape):
    """A weight index."""

    weight_map: dict[Text, Name]  # published key -> file


class _Entry(Shape):
    """A tensor in a safetensors header."""

    dtype: Name
    shape: list[Count]
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a Hugging Face directory's weights.

    Raises:
        InputError: there are none, or the index names one that is missing.
    """
    for name in INDEXES:
        index = directory / name
        if index.is_file():
            mapped = read_file(index, _Index, mend="copy it again").weight_map
            names = sorted(set(mapped.values()))
            outside = [name for name in names if Path(name).name != name or "\0" in name]
            if outside:
                raise InputError(
                    f"{index} names {listed(outside)}, no file(s) of {directory}; copy it again."
                )
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise InputError(
                    f"{directory} lacks {listed(missing)}, which {index.name} names; copy or "
                    f"download the missing shard(s)."
                )
            return [directory / name for name in names]
    for name in SINGLES:
        if (directory / name).is_file():
            return [directory / name]
    for pattern in WEIGHT_FILES:
        if found := sorted(directory.glob(pattern)):
            return found
    raise InputError(
        f"{directory} holds no weights; give a directory with {SINGLES[0]} or {INDEXES[0]}."
    )


def is_hf_directory(directory: Path) -> bool:
    """Whether the directory looks like published weights."""
    names = (*INDEXES, *SINGLES)
    return any((directory / n).is_file() for n in names) or any(directory.glob("*.safetensors"))


def open_hf(
    directory: Path, published_name: Callable[[str], str]
) -> dict[tuple[str, str, str], TensorAt]:
    """{(file, "", published key): where it lies} of all tensors.

    Raises:
        InputError: an unreadable file, a missing shard, or a key that appears twice.
    """
    files, tensors = {}, {}
    for path in weight_files(directory):
        found = (open_safetensors if path.suffix == ".safetensors" else _open_bin)(path)
        for name, at in found.items():
            key = published_name(name)
            if key in files:
                raise InputError(
                    f"{key} is in {directory / files[key]} and again in {path}; remove one of them."
                )
            files[key] = path.name
            tensors[(path.name, "", key)] = at
    return tensors


def open_safetensors(path: Path) -> dict[str, TensorAt]:
    """Where the tensors of one safetensors file lie.

    Raises:
        InputError: the header is unreadable, or does not fit the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(MAX_HEADER, size - 8):
            raise InputError(_broken(path, "its header does not fit the file"))
        try:
            header = json_value(file.read(length), twins=False)
            if isinstance(header, dict):
                header.pop("__metadata__", None)
            found = typed(dict[Text, _Entry], header)
        except ValueError as error:
            raise InputError(_broken(path, f"its header is unreadable ({error})")) from error
    base, tensors, end = 8 + length, {}, 0
    entries = sorted((*one.data_offsets, name, one.dtype, tuple(one.shape))
                     for name, one in found.items())
    for start, stop, name, dtype, shape in entries:
        if dtype not in _DTYPES:
            raise InputError(
                f"{path}: {shown(name)} has dtype {shown(dtype)}; only {', '.join(_DTYPES)} are "
                f"supported, convert it first."
            )
        nbytes = volume(shape) * _DTYPES[dtype].itemsize
        if start != end or stop - start != nbytes:
            raise InputError(_broken(path, f"its header gives {shown(name)} a wrong place"))
        end = stop
        tensors[name] = TensorAt(path=path, offset=base + start, dtype=_DTYPES[dtype], shape=shape)
    if base + end != size:
        raise InputError(
            _broken(path, f"it is {size:,} bytes long but its header asks for {base + end:,}")
        )
    return tensors


def _open_bin(path: Path) -> dict[str, TensorAt]:
    found = open_torch_file(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no table of tensors; copy or download it again.")
    for name, value in found.items():
        if isinstance(value, Record):
            raise InputError(
                f"{path}: {name} is stored as a {type(value).__name__}, which cannot be converted; "
                f"save it as a plain tensor."
            )
    return {name: at for name, at in found.items() if isinstance(at, TensorAt)}


def _broken(path: Path, why: str) -> str:
    return f"{path} is broken: {why}; copy or download it again."


# ---- writing ----------------------------------------------------------------------------------


def shard(
    inventory: Sequence[Stored], dtypes: Mapping[tuple[str, str, str], DType], max_bytes: int
) -> list[list[Stored]]:
    """Distributes tensors, in order, over files of at most `max_bytes` (or of one tensor)."""
    groups, filled = [[]], 0
    for _, parts in _tensors(inventory):
        nbytes = sum(one.numel * dtypes[one.id].itemsize for one in parts)
        if groups[-1] and filled + nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1] += parts
        filled += nbytes
    return groups


def _tensors(inventory: Iterable[Stored]) -> Iterator[tuple[str, list[Stored]]]:
    """The name of every tensor of a file, and its parts; of most that is itself alone."""
    for name, parts in groupby(inventory, key=attrgetter("tensor")):
        yield name, list(parts)


def shard_names(total: int) -> list[str]:
    """What published weights in `total` files call them."""
    if total == 1:
        return [SINGLES[0]]
    return [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]


def lay_out_hf(
    directory: Path,
    files: Mapping[str, Sequence[Stored]],
    dtypes: Mapping[tuple[str, str, str], DType],
) -> dict[tuple[str, str, str], TensorAt]:
    """Writes headers and index, and reserves every file's bytes. Answers where each tensor lies."""
    tensors, total = {}, 0
    for name, group in files.items():
        header, end, starts = {"__metadata__": {"format": "pt"}}, 0, {}
        for tensor, parts in _tensors(group):
            (first, *_), start = parts, end
            dtype = dtypes[first.id]
            for one in parts:
                starts[one.id] = end
                end += one.numel * dtype.itemsize
            shape = [len(parts), *first.shape] if first.of else list(first.shape)
            header[tensor] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path, base = directory / name, 8 + len(text)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            reserve(file, base + end)
        tensors |= {one.id: TensorAt(path=path, offset=base + starts[one.id],
                                     dtype=dtypes[one.id], shape=one.shape) for one in group}
        total += end
    if len(files) > 1:
        index = {"metadata": {"total_size": total},
                 "weight_map": {tensor: name for name, group in files.items()
                                for tensor, _ in _tensors(group)}}
        (directory / INDEXES[0]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return tensors


def copy_side_files(source: Path, target: Path, patterns: Sequence[str] = SIDE_FILES) -> list[str]:
    """Copies configs, tokenizer and templates; answers their names.

    One that is there and the same stays; another is replaced at once, never half written.
    """
    names = sorted({path.name for pattern in patterns for path in source.glob(pattern)
                    if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt")})
    for name in names:
        if (target / name).is_file() and filecmp.cmp(source / name, target / name, shallow=False):
            continue
        pending = target / f".{name}.partial"
        shutil.copyfile(source / name, pending)
        with pending.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(pending, target / name)
    return names
