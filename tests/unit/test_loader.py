"""The loaders on real shards: rows, ranks, resume, and everything that can be wrong on disk."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from itertools import islice, pairwise
from textwrap import dedent
from threading import Thread

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import get_worker_info

from megatron_vl.data import pixels
from megatron_vl.data.loader import DataConfig, build_train_loader, build_valid_loader
from megatron_vl.data.loader_state import from_json, to_json
from megatron_vl.data.media import BadMedia
from megatron_vl.data.mixture import Mixture
from megatron_vl.data.options import MediaLimits
from megatron_vl.data.samples import IGNORE
from megatron_vl.data.task_encoder import stop_on_error
from megatron_vl.errors import InputError

TENSORS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "grid_thw",
           "pixel_patches")


@pytest.fixture
def loaders(hf_dir, spec, wds_dir):
    """Builds the train or validation loader of a small configuration."""

    def build(kind="train", path=wds_dir, rank=0, size=1, hf=hf_dir, limit=None,
              max_samples=None, **options):
        data = None if path is None else Mixture.parse(str(path), max_samples=max_samples)
        settings = {
            "train": data, "valid": data, "seq_length": 256, "micro_batch_size": 2,
            "num_workers": 0, "packing_buffer_size": 64, "shuffle_buffer_size": 20,
        }  # fmt: skip
        config = DataConfig(**(settings | options))
        where = {"hf_dir": hf, "spec": spec, "dp_rank": rank, "dp_size": size}
        if kind == "train":
            return build_train_loader(config, **where)
        return build_valid_loader(config, max_batches=limit, **where)

    return build


def _take(loader, count):
    return list(islice(loader, count))


def _same(one, two):
    assert one.sample_keys == two.sample_keys
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def _samples(wds, split_shards):
    found = {}
    for shard in split_shards:
        with tarfile.open(wds / shard) as tar:
            for name in tar.getnames():
                if name.endswith(".json"):
                    found[f"{shard}/{name[:-5]}"] = json.load(tar.extractfile(name))
    return found


TRAIN = [f"shard-{number:06d}.tar" for number in range(9)]
VALID = ["shard-000009.tar"]


# ---- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [64, None])
def test_rows_hold_whole_samples_in_segments_of_their_own(loaders, spec, wds_dir, hf_dir, packing):
    loader = loaders(packing_buffer_size=packing, max_padding_length=128)
    known = _samples(wds_dir, TRAIN)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    for batch in _take(loader, 4):
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
    full, least = (_take(loaders(row_multiple=multiple, **options), 6) for multiple in (None, 8))
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
    assert {one.tokens.shape for one in _take(packed, 3)} == {(2, 256)}


def test_only_picked_samples_are_decoded(loaders, monkeypatch):
    decoded = []
    real = pixels.decode_rgb
    monkeypatch.setattr(pixels, "decode_rgb", lambda data: decoded.append(1) or real(data))
    batches = _take(loaders(packing_buffer_size=200), 3)
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
    assert seen == Counter(_samples(wds_dir, TRAIN).keys())


def test_no_buffer_ends_in_a_row_that_is_half_empty(loaders, wds_dir):
    """64 samples at a time make three full rows of 1,000 tokens and a fourth with little in it;
    that of the epoch's end stays as it is."""
    rows = _take(loaders(seq_length=1000, micro_batch_size=1), 40)
    epochs = sum(row.num_samples for row in rows) / len(_samples(wds_dir, TRAIN))
    assert epochs > 1 and sum(row.num_tokens < 950 for row in rows) <= epochs


def test_another_seed_gives_another_order(loaders):
    one, two = (_take(loaders(seed=seed), 1)[0] for seed in (1, 2))
    assert one.sample_keys != two.sample_keys


# ---- resume -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "stops"), [
    (0, (3,)), (2, (1,)), (2, (7,)), (2, (0, 1)), (2, (7, 1, 0, 1)), (3, (8, 2, 1)),
])
def test_a_resumed_loader_goes_on_exactly(loaders, workers, stops):
    """Also where it is saved before each reading process has handed over a batch."""
    undisturbed = loaders(num_workers=workers)
    want = _take(undisturbed, sum(stops) + 4)
    undisturbed.close()
    states = []
    for stop in (*stops, 4):
        loader = loaders(num_workers=workers)
        if states:
            loader.restore_state([from_json(states[-1])])
        for one in _take(loader, stop):
            _same(one, want.pop(0))
        states.append(to_json(loader.save_state_rank()))
        loader.close()
    assert not want


def test_a_reading_process_that_is_slow_to_start_skips_nothing(loaders, monkeypatch):
    """The question where it stands reaches it before it has begun."""
    want = _take(loaders(num_workers=2), 5)
    start = Thread.start

    def start_slowly(thread):
        start(thread)
        if thread.name == "command_thread" and get_worker_info().id == 1:
            time.sleep(3)

    monkeypatch.setattr(Thread, "start", start_slowly)
    slow = loaders(num_workers=2)
    _take(slow, 1)
    state = to_json(slow.save_state_rank())
    resumed = loaders(num_workers=2)
    resumed.restore_state([from_json(state)])
    for one, two in zip(want[1:], _take(resumed, 4), strict=True):
        _same(one, two)


def test_a_dataset_with_nothing_to_use_does_not_go_round_for_ever(loaders):
    with pytest.raises(InputError, match="again and again, as shard-.* tokens but a row holds 5"):
        next(iter(loaders(seq_length=5, max_skipped_samples=10**6)))


def test_images_that_can_never_be_decoded_do_not_go_round_for_ever(loaders, wds_dir, monkeypatch):
    def fail(data):
        raise BadMedia("its pixels cannot be decoded")

    monkeypatch.setattr(pixels, "decode_rgb", fail)
    with pytest.raises(InputError, match="again and again, as shard-.* cannot be decoded"):
        next(iter(loaders(max_skipped_samples=10**6)))


def test_a_program_that_keeps_its_loader_can_end(hf_dir, wds_dir):
    program = """
        import sys
        from pathlib import Path
        from megatron_vl.data.loader import DataConfig, build_train_loader
        from megatron_vl.data.mixture import Mixture
        from megatron_vl.models import load_spec
        hf = Path(sys.argv[1])
        config = DataConfig(train=Mixture.parse(sys.argv[2]), seq_length=256, num_workers=1)
        loader = build_train_loader(config, hf_dir=hf, spec=load_spec(hf))
        print(next(iter(loader)).tokens.shape)
    """
    ended = subprocess.run([sys.executable, "-c", dedent(program), hf_dir, wds_dir],
                           capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "torch.Size([1, 256])\n"), ended.stderr


OTHER = {
    "num_workers": (2, "num_workers was 0 and is 2"),
    "micro_batch_size": (1, "micro_batch_size was 2 and is 1"),
    "seq_length": (512, "row length was 256 and is 512"),
    "packing_buffer_size": (None, "packing_buffer_size was 64 and is 0"),
    "shuffle_buffer_size": (10, "shuffle_buffer_size was 20 and is 10"),
    "max_samples_per_sequence": (5, "max_samples_per_sequence was 100 and is 5"),
    "seed": (7, "seed was 1234 and is 7"),
    "max_patches_per_row": (99, "max_patches_per_row was None and is 99"),
    "media": (MediaLimits(image_max_pixels=9000), "image_max_pixels was None and is 9000"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_are_refused_on_resume(loaders, name):
    value, what = OTHER[name]
    state = loaders().save_state_rank()
    with pytest.raises(InputError, match=f"{what}; go on with the old value, or --load") as caught:
        loaders(**{name: value}).restore_state([state])
    assert "\n" not in str(caught.value)


def _recut(wds):
    split = wds / ".nv-meta/split.yaml"
    split.write_text(split.read_text().replace("shard-000008.tar", ""))
    split.write_text(split.read_text().replace("000000..000008", "000000..000007"))


def _retell(wds):
    """Other answers of the same length: everything lies where it lay."""
    _rewrite(wds / TRAIN[0], lambda name, data: data.replace(b'"text": "no"', b'"text": "NO"'))
    noted = wds / ".nv-meta/digests.json"
    known = json.loads(noted.read_text())
    known[TRAIN[0]] = hashlib.sha256((wds / TRAIN[0]).read_bytes()).hexdigest()
    noted.write_text(json.dumps(known))


def _lengthen(wds):
    """As many samples, the first a block longer; what energon writes notes no digests."""
    (wds / ".nv-meta/digests.json").unlink()
    shard, index = wds / TRAIN[0], wds / f"{TRAIN[0]}.idx"
    shard.write_bytes(bytes(512) + shard.read_bytes())
    places = np.fromfile(index, "<u8")
    places[1:] += 512
    places.tofile(index)


OTHER_DATA = {  # what is done to a copy, and what is said of it; None: it is the same data
    "nothing": (lambda wds: None, None),
    "no digests": (lambda wds: (wds / ".nv-meta/digests.json").unlink(), None),
    "a shard less": (_recut, "the samples of {moved} are not those of {wds}, which it read"),
    "other answers": (_retell, "the samples of {moved} are not those of {wds}, which it read"),
    "longer samples": (_lengthen, "the samples of {moved} are not those of {wds}, which it read"),
    "another list": (lambda wds: "1,", "it read {wds} and is to read {moved}, or in other shares"),
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_samples_are_refused_on_resume_by_path_and_the_same_elsewhere_are_not(
    loaders, wds_dir, tmp_path, name
):
    change, what = OTHER_DATA[name]
    state = loaders().save_state_rank()
    moved = _copy(wds_dir, tmp_path / "moved")
    words = change(moved) or ""
    loader = loaders(path=f"{words}{moved}")
    if what is None:
        assert loader.restore_state([state]) == ""
        return
    with pytest.raises(InputError) as caught:
        loader.restore_state([state])
    assert what.format(moved=moved, wds=wds_dir) in str(caught.value)
    assert not re.search("[0-9a-f]{16}", str(caught.value)), "a hash says nothing to anybody"


def test_samples_that_changed_in_their_place_are_refused_on_resume(loaders, wds_dir, tmp_path):
    wds = _copy(wds_dir, tmp_path / "wds")
    state = loaders(path=wds).save_state_rank()
    _retell(wds)
    with pytest.raises(InputError, match=f"the samples of {wds} are others than they were; go on"):
        loaders(path=wds).restore_state([state])


def test_damaged_digests_are_named(loaders, wds_dir, tmp_path):
    wds = _copy(wds_dir, tmp_path / "wds")
    for text in ("[]", "{", ""):
        (wds / ".nv-meta/digests.json").write_text(text)
        with pytest.raises(InputError, match="digests.json .*; prepare the dataset again"):
            loaders(path=wds)


def test_a_data_state_without_its_settings_is_refused(loaders):
    loader = loaders()
    with pytest.raises(InputError, match="does not say which dataset and settings"):
        loader.restore_state([loader.save_state_rank()["state"]])


# ---- validation -------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [16, None])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_validate_on_every_sample_once_in_equally_many_full_batches(
    loaders, wds_dir, packing, size
):
    known = _samples(wds_dir, VALID)
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
        _same(one, two)


def test_validation_stops_after_the_batches_asked_for(loaders):
    whole = list(loaders("valid"))
    assert len(whole) > 2
    for one, two in zip(whole[:2], list(loaders("valid", limit=2)), strict=True):
        _same(one, two)


# ---- what can be wrong ------------------------------------------------------------------------


def _copy(wds, out):
    shutil.copytree(wds, out)
    return out


def _rewrite(shard, change):
    """Rewrite every member of a shard in place, sizes kept."""
    with tarfile.open(shard) as tar:
        spots = [(m.name, m.offset_data, m.size) for m in tar]
    data = bytearray(shard.read_bytes())
    for name, at, size in spots:
        new = change(name, bytes(data[at : at + size]))
        assert len(new) == size
        data[at : at + size] = new
    shard.write_bytes(data)


def _drain(loader):
    with pytest.raises(InputError) as caught:
        for _ in islice(loader, 200):
            pass
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda data: data[:60] + bytes(len(data) - 60), "its pixels cannot be decoded"),
        (lambda data: bytes(len(data)), "not in a format PIL can read"),
    ],
)
def test_one_corrupt_image_stops_training_with_its_name(loaders, wds_dir, tmp_path, workers, damage,
                                                        what):
    wds = _copy(wds_dir, tmp_path / "wds")
    with tarfile.open(wds / TRAIN[4]) as tar:
        victim = next(name for name in tar.getnames() if name.endswith(".png"))
    _rewrite(wds / TRAIN[4], lambda name, data: damage(data) if name == victim else data)
    said = _drain(loaders(path=wds, num_workers=workers))
    assert f"{TRAIN[4]}/{victim.split('.')[0]}" in said
    assert what in said and "mend or remove it" in said


def test_a_sample_that_every_epoch_leaves_out_counts_once(loaders, wds_dir, tmp_path):
    wds = _copy(wds_dir, tmp_path / "wds")
    with tarfile.open(wds / TRAIN[4]) as tar:
        victim = next(name for name in tar.getnames() if name.endswith(".png"))
    _rewrite(wds / TRAIN[4], lambda name, data: bytes(len(data)) if name == victim else data)
    epoch, seen, skipped = len(_samples(wds, TRAIN)), 0, []
    for batch in loaders(path=wds, max_skipped_samples=1):
        seen += batch.num_samples
        skipped += batch.skipped
        if seen > 3 * epoch:
            break
    assert {one.sample for one in skipped} == {f"{TRAIN[4]}/{victim.split('.')[0]}"}
    assert {one.reason for one in skipped} == {"unusable media"}
    assert [one.first for one in skipped] == [True] + [False] * (len(skipped) - 1)
    assert len(skipped) > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_longer_than_a_row_is_named_with_its_length(loaders, workers):
    said = _drain(loaders(seq_length=48, num_workers=workers))
    assert "shard-0000" in said and "tokens but a row holds 48" in said
    assert "raise the sequence length, lower image-max-pixels or video-maxlen" in said
    said = _drain(loaders(packing_buffer_size=None, max_padding_length=48, num_workers=workers))
    assert "raise the padding length" in said


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_json_in_a_shard_is_named(loaders, wds_dir, tmp_path, workers):
    wds = _copy(wds_dir, tmp_path / "wds")
    _rewrite(wds / TRAIN[0], lambda name, data: b"[" * len(data) if name.endswith("json") else data)
    said = _drain(loaders(path=wds, num_workers=workers))
    assert f"sample {TRAIN[0]}/" in said and "cannot be read" in said


def test_an_empty_answer_is_named(loaders, vqa_dir, tmp_path):
    wds = _copy(vqa_dir, tmp_path / "wds")
    dataset = wds / ".nv-meta/dataset.yaml"
    text = dataset.read_text()
    dataset.write_text(text.replace("answers: json[1][value]", "answers: json[1][from]"))
    _rewrite(wds / TRAIN[0], lambda name, data: data.replace(b'"gpt"', b'"   "'))
    assert "its answer is empty" in _drain(loaders(path=wds))


FIELD_MAPS = (  # what is written, what it is changed to, what the error says
    ("image: png", "image: jpg", "lacks a part that the field_map"),
    ("context: json[0][value]", "context: json[5][value]", "lacks a part that the field_map"),
    ("answers: json[1][value]", "answers: json[1][text]", "lacks a part that the field_map"),
    ("image: png", "image: json", "is not an image's bytes, a question and an answer"),
    ("image: png", "picture: png", "field_map of .* lacks image, which a VQASample needs"),
    ("VQASample", "NoSuchSample", "names the sample type NoSuchSample, of which no question"),
)


@pytest.mark.parametrize(("old", "new", "what"), FIELD_MAPS)
def test_a_wrong_field_map_is_named(loaders, vqa_dir, tmp_path, old, new, what):
    wds = _copy(vqa_dir, tmp_path / "wds")
    dataset = wds / ".nv-meta/dataset.yaml"
    assert old in dataset.read_text()
    dataset.write_text(dataset.read_text().replace(old, new))
    with pytest.raises(InputError, match=what):
        for _ in islice(loaders(path=wds), 3):
            pass


def _cut(path):
    path.write_bytes(path.read_bytes()[:-20_000])


def _shorten(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def _recount(wds, count):
    info = wds / ".nv-meta/.info.json"
    known = json.loads(info.read_text())
    known["shard_counts"][TRAIN[3]] = count
    info.write_text(json.dumps(known))


BROKEN = {
    "no directory": (lambda wds: shutil.rmtree(wds), "does not exist; give the directory"),
    "not prepared": (lambda wds: shutil.rmtree(wds / ".nv-meta"), "has no .nv-meta"),
    "no info": (lambda wds: (wds / ".nv-meta/.info.json").unlink(), ".info.json is missing"),
    "no dataset.yaml": (
        lambda wds: (wds / ".nv-meta/dataset.yaml").unlink(), "dataset.yaml is missing"
    ),
    "no split.yaml": (lambda wds: (wds / ".nv-meta/split.yaml").unlink(), "split.yaml is missing"),
    "bad split.yaml": (lambda wds: (wds / ".nv-meta/split.yaml").write_text("{"), "not valid YAML"),
    "empty split": (
        lambda wds: (wds / ".nv-meta/split.yaml").write_text("split_parts: {train: []}"),
        "nothing in its split 'train'",
    ),
    "no shard": (lambda wds: (wds / TRAIN[3]).unlink(), "the shard .*3.tar is missing"),
    "no index": (lambda wds: (wds / f"{TRAIN[3]}.idx").unlink(), "index .*3.tar.idx is missing"),
    "shard cut off": (lambda wds: _cut(wds / TRAIN[3]), "3.tar is cut off"),
    "index of another shard": (
        lambda wds: _shorten(wds / f"{TRAIN[3]}.idx", 8), "3.tar.idx tells of 40 samples but"
        ".*.info.json of 41; copy the dataset again, or prepare the dataset again with `megatron-vl"
    ),
    "index cut off": (
        lambda wds: _shorten(wds / f"{TRAIN[3]}.idx", 4), "3.tar.idx tells of 40.5 samples but"
    ),
    "other counts": (lambda wds: _recount(wds, 400), "3.tar.idx .* 41 samples but .* of 400;"),
    "counts as text": (lambda wds: _recount(wds, "41"), "is .41.: it must be a valid integer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_hole_in_the_dataset_is_one_sentence(loaders, wds_dir, tmp_path, name):
    breaks, what = BROKEN[name]
    wds = _copy(wds_dir, tmp_path / "wds")
    breaks(wds)
    with pytest.raises(InputError, match=what) as caught:
        loaders(path=wds)
    assert "\n" not in str(caught.value)


def test_a_dataset_of_an_older_energon_is_read(loaders, wds_dir, tmp_path):
    wds = _copy(wds_dir, tmp_path / "wds")
    info = wds / ".nv-meta/.info.json"
    info.with_suffix(".yaml").write_text(yaml.safe_dump(json.loads(info.read_text())))
    info.unlink()
    _same(_take(loaders(path=wds), 1)[0], _take(loaders(), 1)[0])


def test_an_error_of_ours_names_its_sample():
    with pytest.raises(RuntimeError, match="sample 07-a: ZeroDivisionError: by zero"):
        stop_on_error(ZeroDivisionError("by zero"), {"__key__": "07-a"}, None)


def test_a_question_that_quotes_a_video_mark_is_named(loaders, wds_dir, tmp_path):
    wds = _copy(wds_dir, tmp_path / "wds")
    mark = b"<|video_pad|>"
    _rewrite(wds / TRAIN[0], lambda name, data: _with_mark(data, mark) if name.endswith("json")
             else data)
    said = _drain(loaders(path=wds))
    assert f"sample {TRAIN[0]}/" in said and "1 video marks for 0 videos" in said


def _with_mark(data, mark):
    at = data.index(b'"text": "') + len(b'"text": "')
    return data[:at] + mark + data[at + len(mark) :]


def test_more_readers_than_samples_are_refused(loaders):
    with pytest.raises(InputError, match="ask for fewer workers"):
        loaders(size=400, num_workers=2)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"seq_length": 0}, "seq-length is 0"),
        ({"num_workers": -1}, "num-workers is -1"),
        ({"max_padding_length": 257}, "padding length 257 is above the sequence length 256"),
        ({"micro_batch_size": 0}, "micro-batch-size is 0"),
    ],
)
def test_unusable_settings_are_refused(loaders, options, what):
    with pytest.raises(InputError, match=what):
        loaders(**options)


def test_images_without_a_dataset_are_refused(loaders):
    with pytest.raises(InputError, match="no training dataset"):
        loaders(train=None)
    with pytest.raises(InputError, match="no validation dataset"):
        loaders("valid", valid=None)
