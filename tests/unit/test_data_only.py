"""A run's checkpoint is read by torch only when it holds nothing but data."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vl.errors import InputError
from megatron_vl.weights.torch_dist import check_data_only


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


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
