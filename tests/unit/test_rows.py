import pickle
from dataclasses import replace

import pytest
import torch

from megatron_vl.data.encode.rows import empty_row, least_length, make_batch, make_row
from megatron_vl.data.encode.samples import (
    IGNORE,
    EncodedSample,
    RowBatch,
    as_tensors,
    by_value,
)


def _sample(key, length, images=0):
    tokens = torch.arange(1, length + 1)
    return EncodedSample(
        __key__=key,
        __restore_key__=(),
        name=key,
        tokens=tokens,
        labels=torch.cat([tokens[1:], torch.tensor([IGNORE])]),
        grids=((1, 2, 2),) * images,
        seconds=(0.0,) * images,
        media=(),
        read=None,
        patches=torch.full((4 * images, 6), float(length)) if images else None,
    )


class Counting:
    """Positions of a text, whatever it holds."""

    axes = 3

    def __call__(self, tokens, grids, seconds=()):
        return torch.arange(len(tokens)).expand(self.axes, -1)


def _batch(**options):
    rows = [make_row([_sample("a", 3), _sample("b", 4, images=2)]), make_row([_sample("c", 8)]),
            empty_row(), make_row([_sample("d", 1, images=1)])]
    return make_batch(rows, row_length=8, pad_token=99, positions=Counting(), **options)


def test_every_sample_is_a_segment_and_so_is_a_tail():
    assert _batch().cu_seqlens.tolist() == [0, 3, 7, 8, 16, 24, 25, 32]
    assert _batch().cu_seqlens.dtype == torch.int32


def test_rows_hold_their_samples_and_then_padding():
    batch = _batch()
    assert batch.tokens.tolist() == [
        [1, 2, 3, 1, 2, 3, 4, 99],
        [1, 2, 3, 4, 5, 6, 7, 8],
        [99] * 8,
        [1] + [99] * 7,
    ]
    assert batch.labels[0].tolist() == [2, 3, IGNORE, 2, 3, 4, IGNORE, IGNORE]
    assert batch.labels[2].tolist() == [IGNORE] * 8
    assert torch.equal(batch.loss_mask, (batch.labels != IGNORE).float())
    assert batch.num_tokens == 16
    assert (batch.num_samples, batch.num_images) == (4, 3)


def test_positions_start_again_with_every_segment():
    positions = _batch().position_ids
    assert positions.shape == (3, 4, 8)
    assert positions[1, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert positions[2, 3].tolist() == [0, *range(7)]


def test_images_stand_in_the_order_of_their_tokens():
    batch = _batch()
    assert batch.pixel_patches[:, 0].tolist() == [4.0] * 8 + [1.0] * 4
    assert batch.grid_thw.tolist() == [[1, 2, 2]] * 3
    assert batch.sample_keys == ["a", "b", "c", "d"]


def test_a_batch_without_images_has_no_patches_and_no_grids():
    batch = make_batch([make_row([_sample("a", 3)])], row_length=3, pad_token=0,
                       positions=Counting())
    assert batch.pixel_patches is None
    assert batch.grid_thw.shape == (0, 3)
    assert batch.cu_seqlens.tolist() == [0, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [
    lambda batch: pickle.loads(pickle.dumps(batch)),  # from a reading process
    lambda batch: RowBatch(**as_tensors(pickle.loads(pickle.dumps(by_value(batch))))),  # of ranks
])
def test_a_batch_travels_between_processes_whole(way, dtype):
    batch = _batch(pixel_dtype=dtype)
    assert batch.pixel_patches.dtype == dtype
    arrived = way(batch)
    for name in ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "pixel_patches"):
        assert torch.equal(getattr(arrived, name), getattr(batch, name))
        assert getattr(arrived, name).dtype == getattr(batch, name).dtype
    assert arrived.sample_keys == batch.sample_keys
    arrived.tokens += 1  # its own memory, writable


def test_what_is_computed_with_moves_and_what_says_where_things_are_stays():
    batch = _batch()
    moved = batch.to("meta")
    assert moved.position_ids.device.type == moved.pixel_patches.device.type == "meta"
    for name in ("tokens", "labels", "loss_mask", "cu_seqlens", "grid_thw"):
        assert getattr(moved, name) is getattr(batch, name)
    assert moved.sample_keys == ["a", "b", "c", "d"]
    assert replace(batch, pixel_patches=None).to("meta").pixel_patches is None


@pytest.mark.parametrize(("longest", "length"), [
    (0, 64), (1, 64), (64, 64), (65, 128), (129, 150), (150, 150),  # 150 is the most
])
def test_a_batch_is_as_long_as_its_longest_row_needs(longest, length):
    rows = [empty_row(), make_row([_sample("a", longest)]) if longest else empty_row()]
    assert least_length(rows, multiple=64, most=150) == length
