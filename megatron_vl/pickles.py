"""Reads pickles as data: nothing a pickle names is imported or called.

A pickle is a program whose calls may be of anything that can be imported. Here every class or
function it names is one of a few containers, or what the caller gives, or a `Record`: an object
that keeps its state and does nothing.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

_CONTAINERS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__")
       for kind in (set, frozenset)},
}


def unchanged(kind: type) -> type:
    """Decorates a class whose objects a pickle meets but may not change.

    Outside other decorators: Python before 3.11.3 gives a dataclass with slots a `__setstate__` of
    its own, whatever the class has.
    """

    def refuse_state(_self: Any, _state: Any) -> None:
        raise pickle.UnpicklingError("it changes what it may not")

    kind.__setstate__ = refuse_state
    return kind


@unchanged
class _Call:
    """A function as a pickle sees it: it may be called and not changed."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class Record:
    """An object of a class that was not imported: its state as attributes."""

    def __new__(cls, *_args, **_kwargs):
        return super().__new__(cls)

    def __init__(self, *_args, **_kwargs) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _DictRecord(Record):
    """One that somebody else is going to fill: a state of two parts may change its class there."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:
            raise pickle.UnpicklingError("it sets more than an object's state")
        super().__setstate__(state)


class Unpickler(pickle.Unpickler):
    """A pickle's content with a `Record` in place of every unknown object.

    Args:
        file: open for reading in binary.
        known: (module, name) -> the function that is called in its place.
        storage: what becomes of a persistent id; without, one is an error.

    Raises:
        pickle.UnpicklingError, EOFError and what else its parts raise: it is broken. Which
            exceptions a broken pickle raises nobody lists.
    """

    _record: type[Record] = Record

    def __init__(
        self, file, known: Mapping[tuple[str, str], Callable] | None = None,
        storage: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(file, encoding="utf-8")
        functions = {("_codecs", "encode"): self._encode, **(known or {})}
        self._known = {**_CONTAINERS, **{at: _Call(one) for at, one in functions.items()}}
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        found = self._known.get((module, name))
        return found or type(name, (self._record,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise pickle.UnpicklingError("it refers to what is not in it")
        return self._storage(pid)

    def _encode(self, text: str, encoding: str) -> bytes:
        """How old protocols write bytes."""
        if encoding != "latin1" or not isinstance(text, str):
            raise pickle.UnpicklingError("it holds bytes in an unknown form")
        return text.encode("latin1")


class DataOnly(Unpickler):
    """The same of a pickle that somebody else is going to run: it may name nothing but `allowed`.

    Args:
        allowed: (module, name) of what may be imported; what torch and its checkpoints are made of
            calls nothing.

    Raises:
        pickle.UnpicklingError: it names something else.
    """

    _record = _DictRecord

    def __init__(self, file, allowed: Collection[tuple[str, str]]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _Call(self._member)
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}"[:120])
        return super().find_class(module, name)

    def _member(self, kind: Any, name: Any) -> Any:
        """A constant of an allowed class: so Python 3.11.0 to 3.11.3 write a member of an Enum."""
        if not (isinstance(kind, type) and issubclass(kind, Record) and isinstance(name, str)
                and name.isupper() and not name.startswith("_")):
            raise pickle.UnpicklingError("it names builtins.getattr")
        return kind()
