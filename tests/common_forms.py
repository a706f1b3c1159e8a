"""Gives a torch_dist checkpoint the form in which one or another Megatron-Core writes it.

Up to 0.18 what is not sharded is in common.pt. 0.19 passes it as one more object to the writer of
the tensors (dist_checkpointing/serialization.py: `sharded_state_dict["common_state"] =
ShardedObject(..)`).
"""

import io
import json
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)

COMMON = "common_state/shard_0_1"


def as_of_0_18(iteration: Path) -> Path:
    common = _taken(iteration)
    torch.save(common, iteration / "common.pt")
    _say(iteration, common_backend="torch", common_backend_version=1)
    return iteration


def as_of_0_19(iteration: Path, common: object = None) -> Path:
    """`common`: what is written as the object instead."""
    held, taken = io.BytesIO(), _taken(iteration)
    torch.save([taken] if common is None else common, held)
    last = max(iteration.glob("*.distcp"))
    with last.open("ab") as out:
        at = out.tell()
        out.write(held.getvalue())
    table = _table(iteration)
    table.state_dict_metadata[COMMON] = BytesStorageMetadata()
    table.storage_data[MetadataIndex(COMMON)] = _StorageInfo(
        relative_path=last.name, offset=at, length=len(held.getvalue()))
    (iteration / ".metadata").write_bytes(pickle.dumps(table))
    _say(iteration)
    return iteration


def in_the_other_form(iteration: Path) -> Path:
    """Other than that of the Megatron-Core which is installed."""
    return (as_of_0_19 if (iteration / "common.pt").is_file() else as_of_0_18)(iteration)


def without_common(iteration: Path) -> Path:
    _taken(iteration)
    return iteration


def _taken(iteration: Path) -> dict:
    """What is not sharded, of which the checkpoint then has nothing."""
    file, table = iteration / "common.pt", _table(iteration)
    if file.is_file():
        common = torch.load(file, weights_only=False)
        file.unlink()
    else:
        place = table.storage_data.pop(MetadataIndex(COMMON))
        del table.state_dict_metadata[COMMON]
        (iteration / ".metadata").write_bytes(pickle.dumps(table))
        held = (iteration / place.relative_path).read_bytes()[place.offset:][:place.length]
        (common,) = torch.load(io.BytesIO(held), weights_only=False)
    (iteration / "SHA256SUMS").unlink(missing_ok=True)
    return common


def _table(iteration: Path) -> Metadata:
    return pickle.loads((iteration / ".metadata").read_bytes())


def _say(iteration: Path, **more: object) -> None:
    (iteration / "metadata.json").write_text(json.dumps(
        {"sharded_backend": "torch_dist", "sharded_backend_version": 1, **more}))
