"""An epoch is a whole: what shuffles samples and what packs them is empty before the next begins.

energon repeats a dataset without end and shuffles behind that. A buffer then holds samples of many
epochs where the dataset is small: of 50 samples and a buffer of 1,000, 20 are not seen in the first
epoch and others four times. Here the order is read, shuffle, encode, pack, and only then repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.energon import SavableDataset, WorkerConfig
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from megatron.energon.wrappers import PackingDataset, ShuffleBufferDataset

from megatron_vl.data.encode.samples import EncodedSample


class EpochShuffle(ShuffleBufferDataset):
    """energon's shuffle buffer, which empties at the end of its dataset.

    Its state says that it does: energon's, saved then, would begin the next epoch early.
    """

    _savable_fields = (*ShuffleBufferDataset._savable_fields, "_empties")

    def reset_state_own(self) -> None:
        super().reset_state_own()
        self._empties = False

    def __iter__(self) -> Iterator:
        buffer = self._active_buffer
        buffer.worker_start()
        source = buffer.append_iter()
        while True:
            count = buffer.len_worker()
            if count >= self.size or (self._empties and count):
                yield buffer.pop(self._worker_rng.randbelow(count))
            elif self._empties:
                break
            elif next(source, None) is None:
                self._empties = True
        self._empties = False


class RowPacking(PackingDataset):
    """energon's packing; what fills a row least goes back to be packed with what comes next.

    Each buffer otherwise ends in a row that is half empty on average. Where the dataset ends, all
    that is left goes out, and its state says so.
    """

    _savable_fields = (*PackingDataset._savable_fields, "_empties")

    def __init__(self, dataset: SavableDataset, buffer_size: int, **options: Any):
        super().__init__(dataset, buffer_size, **options)
        self._select, self.pre_packer = self.pre_packer, self._select_but_the_emptiest

    def reset_state_own(self) -> None:
        super().reset_state_own()
        self._empties = False

    def __iter__(self) -> Iterator:
        yield from super().__iter__()
        self._empties = False

    def _select_but_the_emptiest(self, samples: list[EncodedSample]) -> list[list[EncodedSample]]:
        groups = self._select(samples)
        if len(groups) < 2 or self._empties:
            return groups
        emptiest = min(groups, key=lambda group: sum(sample.num_tokens for sample in group))
        self._reading_buffer.extend(emptiest)
        return [group for group in groups if group is not emptiest]

    def _fill_reading_buffer(self, source_iter: Iterator, log_progress: bool = False) -> bool:
        # Without a progress bar in every worker; and not a sample of the next epoch.
        self._empties = self._empties or not super()._fill_reading_buffer(source_iter)
        return not self._empties


def epoch_length(datasets: Sequence[LoadedDataset], blend_mode: DatasetBlendMode) -> int | None:
    """Samples of an epoch of a mixture; None for one by weight, which has none."""
    if blend_mode == DatasetBlendMode.DATASET_WEIGHT:
        return None
    return int(sum(len(samples_of(one.dataset)) * (one.repetitions or 1) for one in datasets))


def samples_of(factory) -> range:
    """What a metadataset's `subset` leaves of a dataset."""
    total = len(factory)
    return range(*factory.subset.compute_subset(total)) if factory.subset else range(total)


class WholeEpochs:
    """What `TaskEncoder` chains datasets by, so that epochs are whole.

    A mixture by weight has no epoch of its own; each of its datasets has.
    """

    epoch: int | None = None  # see `epoch_length`
    _shuffled: tuple[int, int] = (0, 1)  # samples to draw from, of so many in all datasets

    def build_train_datasets(
        self, *, datasets: Sequence[LoadedDataset], blend_mode: DatasetBlendMode,
        shuffle_buffer_size: int | None = None, **options: Any,
    ) -> SavableDataset:
        self.epoch = epoch_length(datasets, blend_mode)
        total = sum(len(one.dataset) for one in datasets)
        self._shuffled = shuffle_buffer_size or 0, max(1, total)
        return super().build_train_datasets(
            datasets=datasets, blend_mode=blend_mode,
            **(options | {"repeat": blend_mode == DatasetBlendMode.DATASET_WEIGHT}),
        )

    def _load_dataset(
        self, dataset: LoadedDataset, worker_rotation_offset: int, worker_config: WorkerConfig
    ) -> SavableDataset:
        """A dataset with its share of the shuffle buffer."""
        samples = super()._load_dataset(dataset, worker_rotation_offset, worker_config)
        size, total = self._shuffled
        share = -(-size * len(dataset.dataset) // total)
        if share < 2:
            return samples
        return EpochShuffle(samples, size=share, worker_config=worker_config)
