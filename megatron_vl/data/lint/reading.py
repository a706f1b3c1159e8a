"""Which samples are looked at, and how one is read by its place.

energon's own parts do it: its loader finds the datasets of a mixture, its index a sample in the
shards, its dataset.yaml the parts of the sample. Only the order is another.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.energon import Sample, WorkerConfig
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.metadataset import load_dataset
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDatasetList

from megatron_vl.data.load.epochs import epoch_length, samples_of
from megatron_vl.data.load.loader import field_map_errors
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.load.shard_files import SampleReader
from megatron_vl.data.load.task_encoder import TextDecoder, stop_on_error


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """One dataset of a mixture."""

    path: Path
    places: range  # of the samples that are read, in the order of the shards
    share: float  # of the samples a run reads; all leaves' sum to 1
    epoch: float  # samples read in an epoch: a part or a multiple of `places`, where it says so
    _factory: Any
    _reader: SampleReader

    def read(self, place: int) -> dict | None:
        """A sample's parts as their own bytes; None if split.yaml excludes it by name.

        Raises:
            InputError: they cannot be read from the shard.
        """
        return self._reader[place]

    def places_beside(self, names: Collection[str]) -> Iterator[int]:
        """Places of the samples in the shards that hold those of some names: see `sample_name`."""
        begin = 0
        for shard in self._reader.shard_infos:
            if any(f"/{shard.name}/" in f"/{name}" for name in names):
                yield from (n for n in range(begin, begin + shard.count) if n in self.places)
            begin += shard.count

    def load(self, raw: dict) -> dict | Sample:
        """What dataset.yaml makes of a sample's parts.

        Raises:
            InputError, RuntimeError: what would end a training run.
        """
        try:
            return self._factory.load_sample(raw)
        except Exception as error:  # whatever decoding raises; energon hands it on the same way
            stop_on_error(error, raw, None)


def epoch_of(mixture: Mixture) -> int | None:
    """Samples of an epoch of training; None where the datasets are mixed by weight.

    Raises:
        InputError: see `open_leaves`.
    """
    found = _datasets(mixture, "train")
    return epoch_length(found.datasets, found.blend_mode)


def _datasets(mixture: Mixture, split: str) -> LoadedDatasetList:
    with field_map_errors(mixture):
        return load_dataset(mixture.as_energon(split)).get_datasets(
            training=False, split_part=split, decoder=TextDecoder(),
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        )


def open_leaves(mixture: Mixture, split: str) -> list[Leaf]:
    """The datasets of a mixture, each with what a run reads of it.

    Raises:
        InputError: a dataset that is not complete on disk, or whose dataset.yaml cannot be used.
    """
    mixture.check(split)
    found = _datasets(mixture, split)
    with field_map_errors(mixture):
        places = [samples_of(one.dataset) for one in found.datasets]
        amounts = _amounts(found, places, endless=split == "train")
    weighs = found.blend_mode == DatasetBlendMode.DATASET_WEIGHT
    return [
        Leaf(
            path=Path(str(one.dataset.path)), places=read, share=amount / sum(amounts),
            epoch=len(read) if weighs else amount, _factory=one.dataset,
            _reader=SampleReader(ShardInfosITarReader(
                one.dataset.path, one.dataset.shards, part_filter=one.dataset.part_filter,
                sample_filter=one.dataset.sample_filter,
            )),
        )
        for one, read, amount in zip(found.datasets, places, amounts, strict=True)
    ]  # fmt: skip


def _amounts(found: LoadedDatasetList, places: Sequence[range], *, endless: bool) -> list[float]:
    """How much of each dataset is read, in a unit they share; validation reads each once."""
    sizes = list(map(len, places))
    if not endless or found.blend_mode == DatasetBlendMode.NONE:
        return sizes
    if found.blend_mode == DatasetBlendMode.DATASET_WEIGHT:
        return [one.weight for one in found.datasets]
    return [size * one.repetitions for size, one in zip(sizes, found.datasets, strict=True)]


def choose(leaves: Sequence[Leaf], count: int, *, seed: int) -> Iterator[tuple[int, int]]:
    """(leaf, place) of `count` samples in order; of all samples if it is 0.

    Every dataset gives by its share, and is cut into as many stretches of its shards as it gives
    samples: each stretch gives one, at random. So sorted data are seen whole, and data in which
    every second sample is alike are not mistaken either.
    """
    draw = random.Random(seed)
    for number, leaf in enumerate(leaves):
        total = len(leaf.places)
        wanted = min(total, max(1, round(count * leaf.share))) if count else total
        for i in range(wanted):
            first, end = total * i // wanted, total * (i + 1) // wanted
            yield number, leaf.places[first if wanted == total else draw.randrange(first, end)]
