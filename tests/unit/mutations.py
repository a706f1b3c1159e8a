"""Changes of others' files, the same at every run: values of another type, numbers out of range,
odd text, missing keys, deep nesting, other encodings, files cut off."""

from __future__ import annotations

import copy
import json
from random import Random

DEEP_LIST = json.loads("[" * 400 + "]" * 400)
ODD = (
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 2**31, 2**63, 10**20, 10**400, 1e20, 1e308,
    float("nan"), float("inf"), "", " ", "0", "240", "1e3", "None", "null", "true", "\u00b2",
    "\uff11\uff12", "\u0661", "\ud800", "a\0b", "\u202ea", "\x1b[2J", "..", "../../x",
    "/etc/passwd", "a" * 5000, "\u4e2d" * 300, "{a,b}" * 40, "{000000..999999999}",
    "n[0001-10000000]", [], {}, [[]], [1],
    [None], ["a"], {"a": 1}, {"": None}, {"\ud800": 1}, [1] * 1000, DEEP_LIST,
)  # fmt: skip
JUNK = (
    b"\0", b"\xff", b"\xfe\xff", b"\x80", b"[" * 50_000, b'{"a":' * 50_000, b"\r\n", b"\t",
    b"9" * 6000, b"&a [*a]", b"!!python/name:os.system", b"%", b",", b'"', b"}", b"]",
)  # fmt: skip


def places(value, at=()):
    """The way to every part of a value."""
    yield at
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*at, key))


def mutated(value, draw: Random):
    """A value that differs from `value` in one or two places."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 2)):
        ways = [at for at in places(value) if at]
        if not ways:
            return draw.choice(ODD)
        # Every way alike would seldom be one that is short.
        depth = draw.randint(1, max(map(len, ways)))
        *way, last = draw.choice([at for at in ways if len(at) <= depth])
        part = value
        for key in way:
            part = part[key]
        change = draw.randrange(8)
        if change == 0 and isinstance(part, dict):
            del part[last]
        elif change == 1 and isinstance(part, dict):
            part[str(last) + draw.choice(("s", "\u00b2", "\ud800", "x" * 3000))] = part.pop(last)
        elif change == 2:
            part[last] = [part[last]]
        elif change == 3:
            part[last] = str(part[last])
        elif change == 4 and isinstance(part, list):
            part.append(part[last])
        else:
            part[last] = copy.deepcopy(draw.choice(ODD))
    return value


def mutated_bytes(data: bytes, draw: Random) -> bytes:
    """Bytes that differ from `data`."""
    at = draw.randint(0, len(data))
    change = draw.randrange(8)
    if change == 0:
        return data[:at]
    if change == 1:
        encoding = draw.choice(("utf-16", "utf-32", "utf-16-be"))
        return data.decode("utf-8", "replace").encode(encoding)
    if change == 2:
        return b"\xef\xbb\xbf" + data
    if change == 3:
        return data.decode("utf-8", "replace").encode("gbk", "replace") + "\u4e2d".encode("gbk")
    if change == 4:
        return draw.choice((b"", b" ", b"null", b"[]", b"{}", b"3", b'"a"', data * 2))
    if change == 5:
        return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    return data[:at] + draw.choice(JUNK) + data[at:]
