"""The pickled lists of ChatML shards, read as data: nothing in a pickle is imported or called."""

from __future__ import annotations

import io
import pickletools

from megatron_vl.data.conversation import BadEntry
from megatron_vl.errors import shown
from megatron_vl.pickles import DataOnly

MAX_BYTES = 1 << 30  # of one pickle; a sample is held in memory
MAX_FILES = 1 << 16  # of one pickle; a few bytes of it may repeat a list many times
_STORES = ("PUT", "BINPUT", "LONG_BINPUT")
_ALLOWED = {("_codecs", "encode")}  # how protocols 0 to 2 write bytes


def read_pickled_list(entry: dict, part: str) -> list:
    """The list pickled in a part of a sample; [] where there is no such part.

    Raises:
        BadEntry: it is no pickle of a list of plain values.
    """
    data = entry.get(part)
    if data is None:
        return []
    if not isinstance(data, bytes):
        raise BadEntry("wrong shape", f"its `{part}` is no pickled list")
    if len(data) > MAX_BYTES:
        raise BadEntry(
            "unusable media", f"its `{part}` is pickled in {len(data)} bytes, over {MAX_BYTES}"
        )
    try:
        # A reader makes room for as many values as a place is told to be behind.
        for opcode, place, _ in pickletools.genops(data):
            if opcode.name in _STORES and place > len(data):
                raise ValueError(f"it remembers a value in place {place}")
        value = DataOnly(io.BytesIO(data), _ALLOWED).load()
    except Exception as error:  # which exceptions a broken pickle raises nobody lists
        raise BadEntry(
            "unusable media", f"its `{part}` is no pickled list of bytes or of paths "
            f"({shown(str(error)) or type(error).__name__})",
        ) from error
    if not isinstance(value, (list, tuple)):
        raise BadEntry("unusable media", f"its `{part}` is pickled, but no list")
    files = sum(len(one) if isinstance(one, (list, tuple)) else 1 for one in value)
    if files > MAX_FILES:
        raise BadEntry("unusable media", f"its `{part}` is a pickle of {files} files")
    return list(value)
