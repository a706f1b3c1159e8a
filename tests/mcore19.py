"""Gives a torch_dist checkpoint the form in which Megatron-Core 0.19 writes it.

It passes what is not sharded as one more object to the same writer, and writes no common.pt
(dist_checkpointing/serialization.py: `sharded_state_dict["common_state"] = ShardedObject(..)`).
"""

import io
import json
import pickle
from pathlib import Path

COMMON = "common_state/shard_0_1"


def as_of_0_19(iteration: Path, common: object = None) -> Path:
    """`common`: what is written instead of common.pt's content."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    file, held = iteration / "common.pt", io.BytesIO()
    torch.save([torch.load(file, weights_only=False)] if common is None else common, held)
    file.unlink()
    last = max(iteration.glob("*.distcp"))
    with last.open("ab") as out:
        at = out.tell()
        out.write(held.getvalue())
    table = pickle.loads((iteration / ".metadata").read_bytes())
    table.state_dict_metadata[COMMON] = BytesStorageMetadata()
    table.storage_data[MetadataIndex(COMMON)] = _StorageInfo(
        relative_path=last.name, offset=at, length=len(held.getvalue()))
    (iteration / ".metadata").write_bytes(pickle.dumps(table))
    (iteration / "metadata.json").write_text(json.dumps(
        {"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (iteration / "SHA256SUMS").unlink(missing_ok=True)
    return iteration
