"""torch.save files without torch: opened for their table of contents, and laid out to be filled.

Such a file is a zip archive of uncompressed records, all under one folder: `data.pkl`, a pickle of
the objects in which every storage is a persistent id, `data/N`, the bytes of storage N, and
`version`. The pickle is read as data (`pickles`), so no code of a checkpoint runs. The bytes
are little-endian and start at a multiple of 64, as torch writes them, so that they can be mapped.
"""

from __future__ import annotations

import io
import lzma
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_vl.errors import InputError
from megatron_vl.pickles import Unpickler, unchanged
from megatron_vl.weights.dtypes import DType
from megatron_vl.weights.files import TensorAt, reserve

_DTYPES = {  # torch's storage classes
    "DoubleStorage": DType("float64", 8), "FloatStorage": DType("float32", 4),
    "HalfStorage": DType("float16", 2), "BFloat16Storage": DType("bfloat16", 2),
    "LongStorage": DType("int64", 8), "IntStorage": DType("int32", 4),
    "ShortStorage": DType("int16", 2), "CharStorage": DType("int8", 1),
    "ByteStorage": DType("uint8", 1), "BoolStorage": DType("bool", 1),
}
_STORAGES = {dtype.name: storage for storage, dtype in _DTYPES.items()}
_ALIGNMENT = 64  # bytes; torch.serialization's storage_alignment
BROKEN = (  # what reading a file that is none of torch's may raise
    zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError, AttributeError, TypeError,
    ValueError, IndexError, KeyError, ImportError, OverflowError, RuntimeError, MemoryError,
    struct.error, zlib.error, lzma.LZMAError,
)


def open_torch_file(path: Path) -> Any:
    """The file's content with a `TensorAt` for every tensor.

    Raises:
        InputError: the file is missing, cut short or no torch file.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; copy it again.")
    try:
        if not zipfile.is_zipfile(path):
            return _located(_load_old(path), path)
        with path.open("rb") as file:
            return read_archive(file, path)
    except BROKEN as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(
            f"{path} cannot be read as a torch file ({reason}); copy or download it again."
        ) from error


def read_archive(file: BinaryIO, path: Path, offset: int = 0) -> Any:
    """As `open_torch_file`, of an archive that starts at `offset` of `path`; `file` is its bytes.

    Raises:
        BROKEN: it is no archive of torch's.
    """
    with zipfile.ZipFile(file) as archive:
        found = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(found) != 1:
            raise zipfile.BadZipFile("it has no data.pkl")
        folder = found[0].removesuffix("data.pkl")
        _check_plain(archive.getinfo(found[0]))  # unpacked it could be of any size
        if f"{folder}byteorder" in archive.namelist():
            _check_plain(archive.getinfo(f"{folder}byteorder"))
            order = archive.read(f"{folder}byteorder")
            if order != b"little":
                raise zipfile.BadZipFile("it was written by a big-endian machine")
        return _Contents(archive, file, folder, path, offset).load(found[0])


def map_tensor(at: TensorAt):
    """The tensor as torch's, mapped from the file; writing to it does not change the file."""
    import torch

    dtype = getattr(torch, at.dtype.name)
    if at.loaded is not None:
        signed = np.ascontiguousarray(at.loaded).view(f"i{at.dtype.itemsize}")
        return torch.from_numpy(signed).view(dtype)
    if at.nbytes == 0:
        return torch.empty(at.shape, dtype=dtype)
    skip = at.offset % mmap.ALLOCATIONGRANULARITY
    with at.path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), skip + at.nbytes, access=mmap.ACCESS_COPY,
                           offset=at.offset - skip)
    count = at.nbytes // at.dtype.itemsize
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=skip).reshape(at.shape)


# ---- reading ----------------------------------------------------------------------------------


def _check_plain(info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"its record {info.filename} is compressed")


@unchanged
@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: DType
    offset: int  # in the file
    numel: int


class _Contents:
    """What the names in data.pkl stand for."""

    def __init__(
        self, archive: zipfile.ZipFile, file: BinaryIO, folder: str, path: Path, offset: int
    ) -> None:
        self.archive, self.file, self.folder = archive, file, folder
        self.path, self.offset = path, offset

    def load(self, name: str) -> Any:
        known = {
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): self._parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): self._with_attributes,
        }
        with self.archive.open(name) as pickled:
            return Unpickler(io.BytesIO(pickled.read()), known, self._storage).load()

    def _storage(self, pid: Any) -> _Storage:
        kind, storage, key, _device, numel = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to {kind!r}")
        # A kind of numbers that is not known here may be carried but not converted.
        name = storage.__name__
        dtype = _DTYPES.get(name) or DType(name.removesuffix("Storage").lower(), 1)
        info = self.archive.getinfo(f"{self.folder}data/{key}")
        _check_plain(info)
        if type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("it holds a storage of an impossible size")
        if name in _DTYPES and numel * dtype.itemsize > info.file_size:
            raise zipfile.BadZipFile(f"its record {info.filename} is too short")
        self.file.seek(info.header_offset)
        header = self.file.read(30)
        name_length, extra_length = struct.unpack("<2H", header[26:30])
        start = info.header_offset + 30 + name_length + extra_length
        return _Storage(dtype, self.offset + start, numel)

    def _tensor(self, storage: _Storage, first: int, shape: tuple, strides: tuple,
                _requires_grad: bool = False, _hooks: Any = None, bits: Any = None) -> TensorAt:
        if bits:
            raise pickle.UnpicklingError("it holds a negated or conjugated view")
        numbers = (first, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
            raise pickle.UnpicklingError("it holds a tensor of an impossible shape")
        last = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.numel:
            raise pickle.UnpicklingError("it holds a tensor that is larger than its storage")
        dtype, offset = storage.dtype, storage.offset + first * storage.dtype.itemsize
        if _contiguous(shape, strides):
            return TensorAt(path=self.path, offset=offset, dtype=dtype, shape=tuple(shape))
        # Rare, and no byte range: mapped, so that reading it still reads only what is asked for.
        flat = np.memmap(self.path, dtype.bits, "r", offset, (last - first + 1,))
        view = np.lib.stride_tricks.as_strided(
            flat, shape, [s * dtype.itemsize for s in strides], writeable=False
        )
        return TensorAt(path=self.path, offset=offset, dtype=dtype, shape=tuple(shape), loaded=view)

    def _parameter(self, data: TensorAt, *_rest: Any) -> TensorAt:
        return data

    def _with_attributes(self, rebuild: Any, _type: Any, parts: tuple, _state: Any) -> Any:
        return rebuild(*parts)


def _contiguous(shape: tuple, strides: tuple) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return 0 in shape
        step *= size
    return True


def _load_old(path: Path) -> Any:
    """torch's format before 1.6, which is no archive: read whole, by torch."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _located(value: Any, path: Path) -> Any:
    """`value` with a `TensorAt` for every torch tensor."""
    import torch

    if isinstance(value, dict):
        return {key: _located(one, path) for key, one in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    dtype = DType(str(value.dtype).removeprefix("torch."), value.element_size())
    bits = value.contiguous().view(getattr(torch, f"int{8 * dtype.itemsize}")).numpy()
    return TensorAt(path=path, offset=0, dtype=dtype, shape=tuple(value.shape),
                    loaded=bits.view(dtype.bits))


class Section(io.RawIOBase):
    """Bytes [offset, offset + length) of an open file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        super().__init__()
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        if base + to < 0:
            raise OSError("before the start")
        self.at = base + to
        return self.at

    def readinto(self, buffer) -> int:
        self.file.seek(self.offset + self.at)
        wanted = min(len(buffer), max(0, self.length - self.at))
        got = self.file.readinto(memoryview(buffer)[:wanted])
        self.at += got
        return got


# ---- writing ----------------------------------------------------------------------------------

Tables = Mapping[str, Mapping[str, tuple[DType, tuple[int, ...]]]]


def lay_out_torch_file(
    path: Path, plain: Mapping[str, Any], tables: Tables
) -> dict[tuple[str, str], TensorAt]:
    """Writes a file that torch.load reads, with room in place of its tensors' bytes.

    Its content is a dict of `plain`'s entries (containers, numbers, text, an argparse.Namespace)
    and of one dict of tensors for each table: name -> (dtype, shape).

    Returns:
        Where each tensor lies, by (table, name).
    """
    rooms = [(dtype, shape) for names in tables.values() for dtype, shape in names.values()]
    with path.open("wb") as file:
        starts = _archive(file, path.stem, _pickled(plain, tables), rooms)
        reserve(file, file.tell())
    names = [(table, name) for table, names in tables.items() for name in names]
    return {
        key: TensorAt(path=path, offset=start, dtype=dtype, shape=shape)
        for key, start, (dtype, shape) in zip(names, starts, rooms, strict=True)
    }


def lay_out_tensor(file: BinaryIO, path: Path, dtype: DType, shape: tuple[int, ...]) -> TensorAt:
    """Appends to `file`, which is `path`, what torch.save would write of one tensor, as room."""
    pickled = b"".join([pickle.PROTO, b"\x02", *_tensor(0, dtype, shape), pickle.STOP])
    (start,) = _archive(file, "archive", pickled, [(dtype, shape)])
    return TensorAt(path=path, offset=start, dtype=dtype, shape=shape)


def _archive(
    file: BinaryIO, folder: str, pickled: bytes, rooms: Sequence[tuple[DType, tuple[int, ...]]]
) -> list[int]:
    """Appends an archive with room for tensors; answers where in the file each of them starts."""
    base, starts = file.tell(), []
    records = [_record(file, base, f"{folder}/data.pkl", pickled)]
    records.append(_record(file, base, f"{folder}/byteorder", b"little"))
    for number, (dtype, shape) in enumerate(rooms):
        one = _record(file, base, f"{folder}/data/{number}", prod(shape) * dtype.itemsize)
        records.append(one)
        starts.append(base + one.start)
    records.append(_record(file, base, f"{folder}/version", b"3\n"))
    _directory(file, base, records)
    return starts


def _pickled(plain: Mapping[str, Any], tables: Tables) -> bytes:
    """data.pkl: the operations torch.save writes, tensor after tensor; see `pickletools`."""
    made = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for key, value in plain.items():
        made += [_plain(key), _plain(value)]
    number = 0
    for table, names in tables.items():
        made += [_plain(table), pickle.EMPTY_DICT, pickle.MARK]
        for name, (dtype, shape) in names.items():
            made += [_plain(name), *_tensor(number, dtype, shape)]
            number += 1
        made.append(pickle.SETITEMS)
    return b"".join([*made, pickle.SETITEMS, pickle.STOP])


def _tensor(number: int, dtype: DType, shape: tuple[int, ...]) -> list[bytes]:
    """The operations that make a tensor of storage `number`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return [
        pickle.GLOBAL, b"torch._utils\n_rebuild_tensor_v2\n", pickle.MARK,
        pickle.MARK, _plain("storage"),
        pickle.GLOBAL, b"torch\n%s\n" % _STORAGES[dtype.name].encode(),
        _plain(str(number)), _plain("cpu"), _plain(step), pickle.TUPLE, pickle.BINPERSID,
        _plain(0), _plain(tuple(shape)), _plain(tuple(strides)), pickle.NEWFALSE,
        pickle.GLOBAL, b"collections\nOrderedDict\n", pickle.EMPTY_TUPLE, pickle.REDUCE,
        pickle.TUPLE, pickle.REDUCE,
    ]


def _plain(value: Any) -> bytes:
    """The operations that put one plain value on the stack, without a pickle's first and last."""
    return pickle.dumps(value, 2)[2:-1]


@dataclass(frozen=True, slots=True)
class _Record:
    name: bytes
    header: int  # where its local header starts, from the start of the archive
    start: int  # where its bytes start
    size: int
    crc: int


_WIDE = 0xFFFFFFFF  # in a field of 32 bits: the true number is in the zip64 extra field


def _record(file: BinaryIO, base: int, name: str, content: bytes | int) -> _Record:
    """Appends a record to the archive that starts at `base`, or room for `content` bytes."""
    encoded, header = name.encode(), file.tell() - base
    size = content if isinstance(content, int) else len(content)
    # Of a room the checksum is not known; torch does not look at it.
    crc = 0 if isinstance(content, int) else zlib.crc32(content)
    wide = struct.pack("<2H2Q", 1, 16, size, size) if size >= _WIDE else b""
    padding = -(header + 30 + len(encoded) + len(wide)) % _ALIGNMENT
    if 0 < padding < 4:  # an extra field has four bytes of its own
        padding += _ALIGNMENT
    extra = wide
    if padding:
        extra += struct.pack("<2H", 0x4246, padding - 4).ljust(padding, b"Z")
    short = _WIDE if wide else size
    file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 45 if wide else 20, 0x800, 0, 0, 0x21, crc,
                           short, short, len(encoded), len(extra)) + encoded + extra)
    start = file.tell() - base
    if isinstance(content, int):
        file.seek(size, io.SEEK_CUR)
    else:
        file.write(content)
    return _Record(encoded, header, start, size, crc)


def _directory(file: BinaryIO, base: int, records: list[_Record]) -> None:
    """Appends the archive's table of contents."""
    begin = file.tell() - base
    for one in records:
        wide = b"".join(struct.pack("<Q", n) for n in (one.size, one.size, one.header)
                        if n >= _WIDE)
        extra = struct.pack("<2H", 1, len(wide)) + wide if wide else b""
        size = min(one.size, _WIDE)
        version = 45 if wide else 20
        file.write(struct.pack("<4s6H3L5H2L", b"PK\1\2", version, version, 0x800, 0, 0, 0x21,
                               one.crc, size, size, len(one.name), len(extra), 0, 0, 0, 0,
                               min(one.header, _WIDE)) + one.name + extra)
    end, count = file.tell() - base, len(records)
    length = end - begin
    if begin >= _WIDE or length >= _WIDE or count >= 0xFFFF:
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length,
                               begin))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
    file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF),
                           min(length, _WIDE), min(begin, _WIDE), 0))


