"""Batches that are taken and compared, shards that are read and changed."""

import json
import shutil
import tarfile
from itertools import islice

import torch

TENSORS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "grid_thw",
           "pixel_patches")

TRAIN = [f"shard-{number:06d}.tar" for number in range(9)]
VALID = ["shard-000009.tar"]


def take(loader, count):
    return list(islice(loader, count))


def same(one, two):
    assert one.sample_keys == two.sample_keys
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def samples(wds, split_shards):
    found = {}
    for shard in split_shards:
        with tarfile.open(wds / shard) as tar:
            for name in tar.getnames():
                if name.endswith(".json"):
                    found[f"{shard}/{name[:-5]}"] = json.load(tar.extractfile(name))
    return found


def copy(wds, out):
    shutil.copytree(wds, out)
    return out


def rewrite(shard, change):
    """Rewrite every member of a shard in place, sizes kept."""
    with tarfile.open(shard) as tar:
        spots = [(m.name, m.offset_data, m.size) for m in tar]
    data = bytearray(shard.read_bytes())
    for name, at, size in spots:
        new = change(name, bytes(data[at : at + size]))
        assert len(new) == size
        data[at : at + size] = new
    shard.write_bytes(data)
