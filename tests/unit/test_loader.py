"""The loaders on real shards: rows, ranks, validation."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from loader_batches import TRAIN, VALID, same, samples, take

from megatron_vl.data.encode import media
from megatron_vl.data.encode.samples import IGNORE

# ---- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [64, None])
def test_rows_hold_whole_samples_in_segments_of_their_own(loaders, spec, wds_dir, hf_dir, packing):
    loader = loaders(packing_buffer_size=packing, max_padding_length=128)
    known = samples(wds_dir, TRAIN)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    for batch in take(loader, 4):
        assert batch.tokens.shape == (2, 256 if packing else 128)
        flat, labels = batch.tokens.flatten(), batch.labels.flatten()
        positions = batch.position_ids.flatten(1)
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == flat.numel() and bounds == sorted(set(bounds))
        assert (256 if packing else 128) in bounds, "no segment crosses a row"
        keys = iter(batch.sample_keys)
        for begin, end in pairwise(bounds):
            assert positions[:, begin].tolist() == [0, 0, 0]
            if (flat[begin:end] == tokenizer.pad_token_id).all():
                assert (labels[begin:end] == IGNORE).all()
                continue
            user, assistant = known[next(keys)]["messages"]
            assert user["content"][0] == {"type": "image"}
            question, answer = user["content"][1]["text"], assistant["content"][0]["text"]
            text = tokenizer.decode(flat[begin:end])
            assert text.count("<|image_pad|>") == 4
            assert text.endswith(f"<|vision_end|>{question}<|im_end|>\n"
                                 f"<|im_start|>assistant\n{answer}<|im_end|>\n")
            trained = labels[begin:end]
            assert tokenizer.decode(trained[trained != IGNORE]) == f"{answer}<|im_end|>"
        assert next(keys, None) is None
        assert batch.pixel_patches.shape == (16 * batch.num_images, spec.vision.patch_dim)
        assert (flat == spec.tokens.image).sum() == 4 * batch.num_images
        assert batch.num_images == batch.num_samples


@pytest.mark.parametrize("kind", ["train", "valid"])
def test_rows_of_one_sample_are_no_longer_than_their_batch_needs(loaders, kind):
    options = dict(kind=kind, packing_buffer_size=None, max_padding_length=128)
    full, least = (take(loaders(row_multiple=multiple, **options), 6) for multiple in (None, 8))
    assert {one.tokens.shape for one in full} == {(2, 128)}
    assert len({one.tokens.shape for one in least}) > 1
    for one, other in zip(least, full, strict=True):
        length = one.tokens.shape[1]
        assert length == -(-max(one.sample_lengths) // 8) * 8 < 128
        assert one.sample_keys == other.sample_keys
        assert not other.loss_mask[:, length:].any()
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name)[..., :length]), name
        assert torch.equal(one.pixel_patches, other.pixel_patches)
    packed = loaders(row_multiple=8, packing_buffer_size=64, kind=kind)
    assert {one.tokens.shape for one in take(packed, 3)} == {(2, 256)}


def test_pixels_are_rounded_as_a_tower_would(loaders):
    exact, rounded = (take(loaders(**options), 2) for options in (
        {}, {"pixel_dtype": torch.bfloat16}))
    for one, other in zip(exact, rounded, strict=True):
        assert torch.equal(one.pixel_patches.to(torch.bfloat16), other.pixel_patches)


def test_only_picked_samples_are_decoded(loaders, monkeypatch):
    decoded = []
    real = media.decode_rgb
    monkeypatch.setattr(media, "decode_rgb", lambda data: decoded.append(1) or real(data))
    batches = take(loaders(packing_buffer_size=200), 3)
    assert len(decoded) == sum(batch.num_images for batch in batches)


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (2, 0), (2, 2), (3, 1)])
def test_one_epoch_has_every_sample_once_whatever_the_ranks_and_workers(
    loaders, wds_dir, size, workers
):
    seen = Counter()
    for rank in range(size):
        loader = loaders(rank=rank, size=size, num_workers=workers, packing_buffer_size=None,
                         micro_batch_size=1, shuffle_buffer_size=0)
        # Readers take turns and each comes to its own end: the first to repeat ends them all.
        turns = max(1, workers)
        epochs, ended = [set() for _ in range(turns)], set()
        for number, batch in enumerate(loader):
            reader, (key,) = number % turns, batch.sample_keys
            if key in epochs[reader]:
                ended.add(reader)
            elif reader not in ended:
                epochs[reader].add(key)
            if len(ended) == turns:
                break
        loader.close()
        for keys in epochs:
            seen.update(keys)
    assert seen == Counter(samples(wds_dir, TRAIN).keys())


def test_no_buffer_ends_in_a_row_that_is_half_empty(loaders, wds_dir):
    """64 samples at a time make three full rows of 1,000 tokens and a fourth with little in it;
    that of the epoch's end stays as it is."""
    rows = take(loaders(seq_length=1000, micro_batch_size=1), 40)
    epochs = sum(row.num_samples for row in rows) / len(samples(wds_dir, TRAIN))
    assert epochs > 1 and sum(row.num_tokens < 950 for row in rows) <= epochs


def test_another_seed_gives_another_order(loaders):
    one, two = (take(loaders(seed=seed), 1)[0] for seed in (1, 2))
    assert one.sample_keys != two.sample_keys


# ---- validation -------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [16, None])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_validate_on_every_sample_once_in_equally_many_full_batches(
    loaders, wds_dir, packing, size
):
    known = samples(wds_dir, VALID)
    ranks = [
        list(loaders("valid", rank=rank, size=size, packing_buffer_size=packing))
        for rank in range(size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.tokens.shape[0] == 2 for batches in ranks for batch in batches)
    seen = Counter(key for batches in ranks for batch in batches for key in batch.sample_keys)
    assert seen == Counter(dict.fromkeys(known, 1))


def test_validation_starts_over_each_time(loaders):
    loader = loaders("valid", num_workers=1)
    first, second = list(loader), list(loader)
    assert first
    for one, two in zip(first, second, strict=True):
        same(one, two)


def test_validation_stops_after_the_batches_asked_for(loaders):
    whole = list(loaders("valid"))
    assert len(whole) > 2
    for one, two in zip(whole[:2], list(loaders("valid", limit=2)), strict=True):
        same(one, two)
