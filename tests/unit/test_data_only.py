"""A run's checkpoint is read by torch only when it holds nothing but data."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_vl.errors import InputError
from megatron_vl.weights.torch_dist import check_data_only


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class Attribute:
    """Pickled as Python 3.11.0 to 3.11.3 pickle a member of an Enum."""

    def __init__(self, of: object, name: str):
        self.at = of, name

    def __reduce__(self):
        return getattr, self.at


@pytest.fixture(scope="module")
def written(hf_dir, tmp_path_factory) -> Path:
    """Of Megatron-Core's own writing."""
    run, script = tmp_path_factory.mktemp("run"), Path(__file__).with_name("write_torch_dist.py")
    subprocess.run([sys.executable, script, f"{hf_dir}:{run}:1:1536"], check=True)
    return run / "iter_0000007"


@pytest.fixture
def checkpoint(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "checkpoint")


def rewrite_table(checkpoint: Path, change) -> None:
    table = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(table)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(table))


def swap_object(checkpoint: Path, content: object) -> None:
    """Put another object where the random state is."""
    held = io.BytesIO()
    torch.save(content, held)
    (checkpoint / "more.distcp").write_bytes(held.getvalue())

    def point(table) -> None:
        for index, place in table.storage_data.items():
            if index.fqn.startswith("rng_state"):
                place.relative_path, place.offset = "more.distcp", 0
                place.length = len(held.getvalue())

    rewrite_table(checkpoint, point)


def test_megatron_cores_own_checkpoints_pass(checkpoint):
    check_data_only(checkpoint)
    swap_object(checkpoint, [{"torch": torch.ones(3)}])
    check_data_only(checkpoint)


@pytest.mark.parametrize(("of", "name", "passes"), [
    (_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST", True),
    (TensorProperties, "create_from_tensor", False), (TensorProperties, "__class__", False),
    (OrderedDict, "fromkeys", False), ("os", "SYSTEM", False),
])
def test_of_a_class_a_table_may_name_constants_alone(of, name, passes, checkpoint):
    rewrite_table(checkpoint, lambda table: setattr(table, "planner_data", Attribute(of, name)))
    if passes:
        check_data_only(checkpoint)
    else:
        with pytest.raises(InputError, match="names builtins.getattr"):
            check_data_only(checkpoint)


def test_a_table_that_names_a_program_is_refused_and_not_run(checkpoint, tmp_path):
    canary = tmp_path / "canary"
    rewrite_table(checkpoint, lambda table: setattr(table, "planner_data", Bomb(canary)))
    with pytest.raises(InputError, match=r"\.metadata holds .* \(it names posix.system"):
        check_data_only(checkpoint)
    assert not canary.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert canary.exists(), "anybody else would have run it"


def test_an_object_that_names_a_program_is_refused_and_not_run(checkpoint, tmp_path):
    canary = tmp_path / "canary"
    swap_object(checkpoint, Bomb(canary))
    with pytest.raises(InputError, match="more.distcp holds more than data"):
        check_data_only(checkpoint)
    # Each rank looks at its part of the objects; together they look at all.
    refused = 0
    for part in range(2):
        try:
            check_data_only(checkpoint, part, 2)
        except InputError:
            refused += 1
    assert refused == 1 and not canary.exists()


def two_places(table) -> None:
    """torch finds the one without an offset."""
    for index, place in list(table.storage_data.items()):
        if index.fqn.startswith("rng_state"):
            table.storage_data[MetadataIndex(index.fqn, offset=[7])] = replace(
                place, relative_path="good.distcp", length=1 << 20
            )


def looks_like_a_tensor(table) -> None:
    """torch goes by the class."""
    for name, record in table.state_dict_metadata.items():
        if name.startswith("rng_state"):
            record.chunks = []


def compressed(table) -> None:
    """What torch reads then is not what lies there."""
    for index, place in table.storage_data.items():
        if index.fqn.startswith("rng_state"):
            place.relative_path, place.transform_descriptors = "good.distcp", ("stream.zstd",)


class OfAnotherClass:
    """Pickled, a tensor's record until its state is set from slots, which can set its class."""

    def __reduce__(self):
        return TensorStorageMetadata, (None, None, []), (None, {"__class__": BytesStorageMetadata})


def changes_its_class(table) -> None:
    for name in table.state_dict_metadata:
        if name.startswith("rng_state"):
            table.state_dict_metadata[name] = OfAnotherClass()


@pytest.mark.parametrize("hide", [two_places, looks_like_a_tensor, compressed, changes_its_class])
def test_an_object_that_the_table_hides_is_refused_and_not_run(hide, checkpoint, tmp_path):
    canary = tmp_path / "canary"
    swap_object(checkpoint, Bomb(canary))
    good = io.BytesIO()
    torch.save([1], good)
    (checkpoint / "good.distcp").write_bytes(good.getvalue())
    rewrite_table(checkpoint, hide)
    with pytest.raises(InputError, match="holds more than data"):
        check_data_only(checkpoint)
    assert not canary.exists()


def test_a_second_table_is_refused(checkpoint):
    """torch reads it where the first one fails."""
    shutil.copy(checkpoint / ".metadata", checkpoint / "__0.metadata")
    with pytest.raises(InputError, match="__0.metadata holds more than data"):
        check_data_only(checkpoint)


def test_a_table_that_reads_files_elsewhere_is_refused(checkpoint):
    def leave(table) -> None:
        next(iter(table.storage_data.values())).relative_path = "../../secret"

    rewrite_table(checkpoint, leave)
    with pytest.raises(InputError, match=r"it reads \.\./\.\./secret, outside of it"):
        check_data_only(checkpoint)


@pytest.mark.parametrize("content", [b"", b"?", b"\x80\x04]" + b"]" * 10000 + b"."])
def test_a_broken_table_is_refused(content, checkpoint):
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(InputError, match="holds more than data"):
        check_data_only(checkpoint)
