"""Reads the pickled lists of ChatML shards as data: nothing in a pickle is imported or called.

A pickle is a program for a small machine. The few instructions that build lists of bytes and of
text are followed here; at any other, such as one that names a class, the entry is refused.
"""

from __future__ import annotations

import pickletools
from typing import Any

from megatron_vl.data.conversation import BadEntry

MAX_BYTES = 1 << 30  # of one pickle; a sample is held in memory
MAX_FILES = 1 << 16  # of one pickle; a few bytes of it may repeat a list many times
_VALUES = frozenset((
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
))  # fmt: skip
_STORES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_LOADS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_ENCODE = object()  # the one call that is understood: how protocols 0 to 2 write bytes
_MARK = object()


class _Refused(ValueError):
    """A pickle of something else than lists of bytes and of text."""


def read_pickled_list(entry: dict, part: str) -> list:
    """The list pickled in a part of a sample; [] where there is no such part.

    Raises:
        BadEntry: it is no pickle of a list of bytes and text, or of lists of these.
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
        value = _follow(data)
    except _Refused as error:
        raise BadEntry(
            "unusable media",
            f"its `{part}` holds {error}; only pickled lists of bytes or of paths are read",
        ) from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise BadEntry("unusable media", f"its `{part}` is no pickle, or a broken one") from error
    if not isinstance(value, (list, tuple)):
        raise BadEntry("unusable media", f"its `{part}` is pickled, but no list")
    files = sum(len(one) if isinstance(one, (list, tuple)) else 1 for one in value)
    if files > MAX_FILES:
        raise BadEntry("unusable media", f"its `{part}` is a pickle of {files} files")
    return list(value)


def _follow(data: bytes) -> Any:
    """The value of a pickle that builds lists and tuples of plain values."""
    stack: list = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in _VALUES:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "APPEND":
            value = stack.pop()
            _list(stack).append(value)
        elif name == "APPENDS":
            values = _since_mark(stack)
            _list(stack).extend(values)
        elif name in ("LIST", "TUPLE"):
            values = _since_mark(stack)
            stack.append(values if name == "LIST" else tuple(values))
        elif name in _TUPLES:
            values = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(values)))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _STORES:
            memo[argument] = stack[-1]
        elif name in _LOADS:
            stack.append(memo[argument])
        elif name == "GLOBAL" and argument == "_codecs encode":
            stack.append(_ENCODE)
        elif name == "REDUCE" and stack[-2] is _ENCODE and stack[-1][1] == "latin1":
            text, _ = stack.pop()
            stack[-1] = text.encode("latin1")
        elif name == "GLOBAL":
            raise _Refused(f"a pickled {argument.replace(' ', '.', 1)}")
        elif name == "STACK_GLOBAL":
            raise _Refused(f"a pickled {stack[-2]}.{stack[-1]}")
        else:
            raise _Refused(f"a pickle's instruction {name}")
    raise ValueError("it does not end")


def _list(stack: list) -> list:
    if not isinstance(stack[-1], list):
        raise ValueError("it adds to what is no list")
    return stack[-1]


def _since_mark(stack: list) -> list:
    """Take what stands above the last mark off the stack, and the mark."""
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise ValueError("it has no mark")
    values = stack[at + 1 :]
    del stack[at:]
    return values
