"""Where a loader stood in its data, as JSON: nothing that reads it can be made to run code.

energon's state is a tree of its own dataclasses, of dicts, lists and tuples, and of random states.
What JSON has no word for is written as {"~": kind, ...}; a kind is one of a closed list.
"""

from __future__ import annotations

import base64
import json
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState
from pydantic import InstanceOf

from megatron_vl.inputs import json_value
from megatron_vl.typed import Count, Shape, typed

_KIND = "~"


class _Loader(Shape):
    worker_states: list[InstanceOf[SavableDatasetCheckpoint] | InstanceOf[FlexState]]
    next_worker_id: Count
    micro_batch_size: Count | None


class _Checkpoint(Shape):
    state: InstanceOf[SavableDatasetState] | None
    offset: Count


class _Dataset(Shape):
    rng: InstanceOf[SystemRngState]
    dataset_state: InstanceOf[FlexState]
    sample_index: Count


class _Random(Shape):
    torch: InstanceOf[torch.Tensor]
    numpy: tuple | dict
    random: tuple


class _Slice(Shape):
    index: Count
    current: Count


# energon's classes by their names, and the types of their fields, which it does not look at.
_CLASSES = {one.__name__: (one, shape) for one, shape in (
    (SavableDataLoaderState, _Loader), (SavableDatasetCheckpoint, _Checkpoint),
    (SavableDatasetState, _Dataset), (SystemRngState, _Random), (SliceState, _Slice),
)}


def to_json(state: dict) -> str:
    """What `RowLoader.save_state_rank` returned.

    Raises:
        TypeError: this release of energon keeps something in it that is not known here.
    """
    return json.dumps(_plain(state), separators=(",", ":"))


def from_json(text: str) -> dict:
    """The inverse of `to_json`.

    Raises:
        ValueError: the text is no such state.
    """
    try:
        state = _object(json_value(text))
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not isinstance(state, dict):
        raise ValueError("it is not the state of a loader")
    return state


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, tuple):
        return {_KIND: "tuple", "of": [_plain(one) for one in value]}
    if isinstance(value, dict):
        kind = "FlexState" if isinstance(value, FlexState) else "dict"
        return {_KIND: kind, "of": [[_plain(k), _plain(v)] for k, v in value.items()]}
    if isinstance(value, bytes):
        return {_KIND: "bytes", "of": base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor):
        return {_KIND: "tensor", "of": _plain(value.numpy())}
    if isinstance(value, np.ndarray):
        return {_KIND: "array", "dtype": value.dtype.str, "shape": list(value.shape),
                "of": base64.b64encode(value.tobytes()).decode()}
    name = type(value).__name__
    if is_dataclass(value) and _CLASSES.get(name, (None,))[0] is type(value):
        return {_KIND: name, "of": {f.name: _plain(getattr(value, f.name)) for f in fields(value)}}
    raise TypeError(f"the loader's state holds a {type(value)}")


def _object(value: Any) -> Any:
    if isinstance(value, list):
        return [_object(one) for one in value]
    if not isinstance(value, dict):
        return value
    kind, held = value[_KIND], value["of"]
    if kind == "tuple":
        return tuple(_object(one) for one in held)
    if kind in ("dict", "FlexState"):
        pairs = {_object(key): _object(one) for key, one in held}
        return FlexState(pairs) if kind == "FlexState" else pairs
    if kind == "bytes":
        return base64.b64decode(held, validate=True)
    if kind == "tensor":
        return torch.from_numpy(_object(held))
    if kind == "array":
        numbers = np.frombuffer(base64.b64decode(held, validate=True), np.dtype(value["dtype"]))
        return numbers.reshape(value["shape"]).copy()
    made, shape = _CLASSES[kind]
    values = {name: _object(one) for name, one in held.items()}
    typed(shape, values, kind)
    return made(**values)
