"""Files that hold raw entries: a JSON list, JSON lines, a parquet table, a tar shard.

Each class reads one file: `entries` gives (where in the file, the entry or what is wrong with it),
one after another, and `count` how many there are, or None where counting means reading it all.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from megatron_vl.data.conversation import BadEntry
from megatron_vl.data.raw.formats.chatml import SHARD_PARTS
from megatron_vl.data.raw.formats.pickled import MAX_BYTES
from megatron_vl.errors import InputError
from megatron_vl.inputs import json_value, not_utf8, why_not_utf8

LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
TARS = (".tar", ".tar.gz", ".tgz")
_TABLE = (
    "is {}, which is not read; write its rows as JSON lines, such as with pandas: "
    "pandas.{}(..).to_json('data.jsonl', orient='records', lines=True, force_ascii=False)"
)
_PACKED = "is compressed; unpack it and give what was in it"
OTHERS = {  # by their names' ends: what people keep data in that is not read, and what to do
    ".csv": _TABLE.format("a CSV table", "read_csv"),
    ".tsv": _TABLE.format("a CSV table with tabs", "read_table"),
    ".xls": _TABLE.format("a spreadsheet", "read_excel"),
    ".xlsx": _TABLE.format("a spreadsheet", "read_excel"),
    ".feather": _TABLE.format("a Feather table", "read_feather"),
    ".arrow": "is a table of Hugging Face datasets, which is not read; write it as parquet: "
              "datasets.load_from_disk(DIR).to_parquet('data.parquet')",
    **dict.fromkeys((".gz", ".zip", ".zst", ".xz", ".bz2", ".7z", ".rar"), _PACKED),
}
_ROWS = 32  # of a table read at once: they may hold their images' bytes
_MAX_HEADER = 1 << 20  # bytes of a tar member's name and attributes
_AT_ONCE = 1 << 30  # bytes of a table that are unpacked at once, if one row is not more


class SourceFile:
    """One file of entries."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> Iterator[tuple[str, dict | BadEntry]]:
        """(where, entry) of each entry, in order.

        Raises:
            InputError: the file as a whole cannot be read.
        """
        raise NotImplementedError

    def count(self) -> int | None:
        """How many there are; None where that is not known before they are read."""
        return None

    def _unreadable(self, error: Exception, mend: str) -> InputError:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        return InputError(f"{self.path} cannot be read ({text}); {mend}.")


class JsonList(SourceFile):
    """`[{...}, ...]`, read whole."""

    @cached_property
    def _list(self) -> list:
        try:
            data = self.path.read_bytes()
            found = json_value(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} {not_utf8(data)}.") from error
        except OSError as error:
            raise self._unreadable(error, "check the file") from error
        except json.JSONDecodeError as error:
            raise InputError(
                f"{self.path} is not valid JSON (line {error.lineno}, column {error.colno}: "
                f"{error.msg}); download or write it again."
            ) from error
        if isinstance(found, dict):
            found = self._listed(found)
        if not isinstance(found, list) or not found:
            raise InputError(
                f"{self.path} holds no list of entries; give a file with [{{...}}, ...]."
            )
        return found

    def _listed(self, found: dict) -> list | None:
        """The list in `{"data": [{...}, ...]}`, where it is certain that this is meant."""
        lists = [key for key, value in found.items()
                 if isinstance(value, list) and value and isinstance(value[0], dict)]
        if lists == ["data"]:
            return found["data"]
        if any(key in found for key in ("conversations", "messages", "instruction")):
            raise InputError(f"{self.path} is a single entry; write a list of them, [{{...}}].")
        if lists:
            names = ", ".join(map(repr, lists[:5]))
            raise InputError(
                f"{self.path} is an object with lists under {names}; write the list of entries "
                f"alone, [{{...}}, ...], or under 'data' and no other."
            )
        return None

    def entries(self) -> Iterator[tuple[str, dict | BadEntry]]:
        found = self._list
        del self._list  # an entry is held no longer than it is read; another time the file is
        for number in range(len(found)):
            entry, found[number] = found[number], None
            yield f"entry {number}", _object(entry)

    def count(self) -> int:
        return len(self._list)


class JsonLines(SourceFile):
    """One object a line; a line that is none costs that line alone."""

    def entries(self) -> Iterator[tuple[str, dict | BadEntry]]:
        for number, line in self._lines():
            yield f"line {number}", _line(line)

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """(number from 1, text) of each line that is not blank."""
        try:
            with self.path.open("rb") as file:
                lines = iter(lambda: file.readline(MAX_BYTES + 1), b"")
                for number, line in enumerate(lines, start=1):
                    if len(line) > MAX_BYTES:
                        raise OSError(f"line {number} has over {MAX_BYTES} bytes")
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.strip():
                        yield number, line
        except OSError as error:
            raise self._unreadable(error, "check the file") from error


class ParquetTable(SourceFile):
    """A row an entry. Images are `{"bytes", "path"}`, as Hugging Face datasets write them."""

    def entries(self) -> Iterator[tuple[str, dict | BadEntry]]:
        number = 0
        with self._open() as table:
            # A few packed bytes may be the same gigabyte in every row: no value is longer than its
            # column is unpacked.
            groups = map(table.metadata.row_group, range(table.metadata.num_row_groups))
            most = max((group.column(number).total_uncompressed_size for group in groups
                        for number in range(group.num_columns)), default=0)
            rows = max(1, min(_ROWS, _AT_ONCE // max(1, most)))
            batches = table.iter_batches(batch_size=rows)
            while True:
                try:
                    batch = next(batches, None)
                except (OSError, ValueError) as error:  # pyarrow's own errors are among them
                    raise self._unreadable(error, "download or write it again") from error
                if batch is None:
                    return
                for row in range(batch.num_rows):
                    yield f"row {number}", _row(batch.slice(row, 1))
                    number += 1

    def count(self) -> int:
        with self._open() as table:
            return table.metadata.num_rows

    def _open(self):
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise InputError(
                f"{self.path} is read with pyarrow, which is not installed; "
                f"run pip install pyarrow."
            ) from error
        try:
            return ParquetFile(self.path)
        except (OSError, ValueError) as error:
            raise self._unreadable(error, "download or write it again") from error


class _Header(tarfile.TarInfo):
    """A member's header. tarfile takes a broken one for the end, which would lose all after it.

    And it reads a long name or an extended header whole, of whatever size it says it is.
    """

    _READ_WHOLE = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
                   tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            header = super().frombuf(buf, encoding, errors)
            if header.type in cls._READ_WHOLE and header.size > _MAX_HEADER:
                raise tarfile.ReadError(f"a header of {header.size} bytes")
            return header
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a member or the end must be") from error


class TarShard(SourceFile):
    """A WebDataset shard of ChatML samples: members `KEY.json`, `KEY.jpgs`, `KEY.videos`.

    A sample's members stand side by side. Its entry is their bytes under their extensions, and its
    key as `id`.
    """

    def entries(self) -> Iterator[tuple[str, dict | BadEntry]]:
        key, entry = None, {}
        try:
            # As a stream: no member is looked for, and none is kept.
            mode = "r|" if self.path.name.lower().endswith(TARS[0]) else "r|gz"
            with tarfile.open(self.path, mode, tarinfo=_Header) as tar:
                for member in tar:
                    own, part = _key(member.name)
                    if not member.isfile() or part not in SHARD_PARTS:
                        continue
                    if own != key or part in entry:
                        if key is not None:
                            yield f"sample {key}", _sample(entry)
                        key, entry = own, {"id": own}
                    entry[part] = self._content(tar, member)
            if key is not None:
                yield f"sample {key}", _sample(entry)
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            raise self._unreadable(error, "download or write the shard again") from error

    @staticmethod
    def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | BadEntry:
        if member.size > MAX_BYTES:
            return BadEntry("unusable media", f"{member.name} has {member.size} bytes")
        data = tar.extractfile(member).read()
        if len(data) < member.size:
            raise EOFError(f"it ends inside {member.name}")
        return data


def open_file(path: Path) -> SourceFile:
    """The reader of a file, by its name and its first line.

    Raises:
        InputError: it cannot be opened.
    """
    name = path.name.lower()
    if name.endswith(TARS):
        return TarShard(path)
    if name.endswith(PARQUET):
        return ParquetTable(path)
    if is_other(path):
        raise InputError(f"{path} {OTHERS[path.suffix.lower()]}.")
    try:
        with path.open("rb") as file:
            begin = file.read(4)
            if not json.detect_encoding(begin).startswith("utf-8"):
                raise InputError(f"{path} {not_utf8(begin)}.")
            file.seek(0)
            lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)
            first = next(filter(None, lines), b"")
            more = next(filter(None, lines), None) if first.startswith(b"{") else None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); check the file.") from error
    if name.endswith(LINES):
        return JsonList(path) if first.startswith(b"[") else JsonLines(path)
    # JSON lines are often called .json.
    is_lines = more is not None and isinstance(_line(first), dict)
    return JsonLines(path) if is_lines else JsonList(path)


def is_other(path: Path) -> bool:
    """Whether a file is by its name of a kind that people keep data in and that is not read."""
    return path.suffix.lower() in OTHERS


def _object(entry) -> dict | BadEntry:
    return entry if isinstance(entry, dict) else BadEntry("wrong shape", "it is not an object")


def _line(line: bytes) -> dict | BadEntry:
    try:
        return _object(json_value(line.decode("utf-8")))
    except UnicodeDecodeError:
        return BadEntry("bad text", f"it {why_not_utf8(line)}")
    except ValueError as error:
        return BadEntry("wrong shape", f"it is not valid JSON ({error})")


def _row(table) -> dict | BadEntry:
    """The one row of a pyarrow table, as Python's values."""
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadEntry("bad text", f"it is not UTF-8 ({error})")
    except (ValueError, OverflowError) as error:
        return BadEntry("wrong shape", f"it holds a value that cannot be read ({error})")


def _key(name: str) -> tuple[str, str]:
    """A member's key and extension, WebDataset's way: cut at the first dot of the file's name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _sample(entry: dict) -> dict | BadEntry:
    bad = next((part for part in entry.values() if isinstance(part, BadEntry)), None)
    if bad is not None:
        return bad
    if "json" not in entry:
        return BadEntry("wrong shape", "the sample has no .json part")
    return entry
