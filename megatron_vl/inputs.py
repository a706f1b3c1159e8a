"""JSON and YAML that others wrote: read, or refused by a ValueError, in memory that fits the text.

Python's own readers let some texts through to other errors: brackets nested a hundred thousand deep
to a RecursionError; numbers of a million digits; in YAML an alias of an alias of an alias, a few
lines that are written out as gigabytes by whoever prints or compares them. What types the values
have is another question: see `typed`.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from megatron_vl.errors import shown

MAX_NODES = 1_000_000  # values of a YAML text, an alias counted as all that it repeats
MAX_DEPTH = 200  # lists and tables within one another, far from what Python can call


class WrongEncoding(ValueError):
    """A text that is not UTF-8; the message has the mend."""


def read_text(path: Path, *, marked: bool = True) -> str:
    """The text of a file in UTF-8.

    Args:
        marked: whether it may begin with the mark that some editors write, which others who read
            the file do not take.

    Raises:
        OSError: it cannot be read.
        WrongEncoding: it is in another encoding.
        ValueError: the path is none.
    """
    data = path.read_bytes()
    if not marked and data.startswith(codecs.BOM_UTF8):
        raise WrongEncoding("it begins with a byte order mark; save it as UTF-8 without one")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WrongEncoding(f"it {not_utf8(data)}") from error


def not_utf8(data: bytes) -> str:
    """Why a text cannot be read, and the mend; `data` is all of it, or the first four bytes."""
    return f"{why_not_utf8(data)}; save it as UTF-8"


def why_not_utf8(data: bytes) -> str:
    """The same without the mend."""
    encoding = json.detect_encoding(data[:4])
    looks = "" if encoding.startswith("utf-8") else f" (it looks like {encoding.upper()[:6]})"
    if not looks:
        with contextlib.suppress(UnicodeDecodeError):
            data.decode("gb18030")
            looks = " (it may be GBK)"
    return f"is not UTF-8{looks}"


def json_value(text: str | bytes, *, twins: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        twins: whether a key may stand twice in one table, of which the last counts.

    Raises:
        json.JSONDecodeError: it is none, or cannot be held.
        UnicodeDecodeError: bytes that are no text.
    """
    try:
        value = json.loads(text, object_pairs_hook=None if twins else _table)
        if _is_deep(value, text):
            raise RecursionError
        return value
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError as error:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from error
    except ValueError as error:  # an integer too long to read
        raise json.JSONDecodeError(str(error), "", 0) from error


def yaml_value(text: str) -> Any:
    """The plain value of a YAML text: no tag makes anything but text, numbers, lists and tables.

    Raises:
        ValueError: it is none, a key stands twice, or aliases repeat more of it than anyone writes.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_NODES:
            raise ValueError(f"its aliases stand for more than {MAX_NODES:,} values")
        value = loader.construct_document(node)
        if _is_deep(value, text):
            raise RecursionError
        return value
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(line + shown(error.problem or error.context)) from error
    except yaml.YAMLError as error:
        raise ValueError(shown(" ".join(str(error).split()))) from error
    except (AttributeError, LookupError, TypeError) as error:
        # What PyYAML makes of a tag before a value that is none of its kind, as in `!!bool maybe`.
        raise ValueError(f"a value is not of the kind that its tag names ({error})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def _is_deep(value: Any, text: str | bytes) -> bool:
    """Whether lists and tables lie in one another more than `MAX_DEPTH` deep."""
    if len(text) <= MAX_DEPTH:
        return False
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [one for part in level if isinstance(part, (list, dict))
                 for one in (part.values() if isinstance(part, dict) else part)
                 if isinstance(one, (list, dict))]
        if not level:
            return False
    return True


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = Counter(key for key, _ in pairs)
    if len(keys) < len(pairs):
        twice = next(key for key, times in keys.items() if times > 1)
        raise ValueError(f"{twice} appears twice")
    return dict(pairs)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node, each as often as it would be written out."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # should it hold itself
        children = node.value
        if isinstance(node, yaml.MappingNode):
            # Readers differ in which of two counts: what is checked must be what is used.
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((key for key, times in Counter(keys).items() if times > 1), None)
            if twice is not None:
                raise ValueError(f"its key {twice!r} stands twice in one table")
            children = [one for pair in node.value for one in pair]
        known[id(node)] = 1 + sum(_size(one, known) for one in children)
    return known[id(node)]
