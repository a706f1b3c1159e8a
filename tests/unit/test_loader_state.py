"""A loader's state as JSON: all of it comes back, and nothing in it can be made to run."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRng
from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState

from megatron_vl.data.load.loader_state import from_json, to_json


@pytest.fixture
def state() -> dict:
    """The kinds that energon's states are made of; whole ones are tested with the loader."""
    inner = FlexState(
        rng=bytes(range(256)), keys=[("Map", 0, "Webdataset", 3)], none=None, at=2.5, on=True,
        slices=[SliceState(index=1, current=2)], counts={1: "one", ("a", 2): []},
    )
    checkpoint = SavableDatasetCheckpoint(
        state=SavableDatasetState(
            rng=SystemRng.save_state(), dataset_state=inner, sample_index=7
        ), offset=3,
    )
    made = SavableDataLoaderState(
        worker_states=[checkpoint, FlexState()], next_worker_id=1, micro_batch_size=None
    )
    return {"state": made, "made_for": {"seed": 1, "path": "数据"}}


def same(one, two) -> None:
    assert type(one) is type(two)
    if is_dataclass(one):
        for field in fields(one):
            same(getattr(one, field.name), getattr(two, field.name))
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, two, strict=True):
            same(a, b)
    elif isinstance(one, (torch.Tensor, np.ndarray)):
        assert one.dtype == two.dtype and one.shape == two.shape and bool((one == two).all())
    else:
        assert one == two


def test_a_state_comes_back_as_it_was(state):
    again = from_json(to_json(state))
    same(state, again)
    SystemRng.restore_state(again["state"].worker_states[0].state.rng)


def test_what_a_later_energon_may_add_is_refused_when_it_is_saved(state):
    state["state"].worker_states[1]["new"] = object()
    with pytest.raises(TypeError, match="holds a <class 'object'>"):
        to_json(state)
    state["state"].worker_states[1]["new"] = type("SystemRngState", (), {})()
    with pytest.raises(TypeError, match="SystemRngState"):
        to_json(state)


HOSTILE = {
    "no state": "[]",
    "no JSON": "{",
    "an unknown kind": '{"~": "system", "of": "touch canary"}',
    "a class of a module": '{"~": "os.system", "of": {}}',
    "fields that it has not": '{"~": "SliceState", "of": {"index": 1, "command": "x"}}',
    "an array of objects": '{"~": "array", "dtype": "O", "shape": [1], "of": "AAAAAAAAAAA="}',
    "an array larger than its bytes": '{"~": "array", "dtype": "<i8", "shape": [9], "of": ""}',
    "bytes that are none": '{"~": "bytes", "of": "%"}',
    "a list as a key": '{"~": "dict", "of": [[[], 1]]}',
    "no kind": '{"of": 1}',
    "very deep": '{"~": "tuple", "of": [' * 100000,
    "very deep and whole": "[" * 5000 + "]" * 5000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_state_is_refused(text):
    with pytest.raises(ValueError):
        from_json(text)


def test_the_file_is_plain_json(state):
    read = json.loads(to_json(state))
    assert read["~"] == "dict" and dict(read["of"])["made_for"]["of"][0] == ["seed", 1]
