"""Everything that can be wrong with prepared data is one sentence of the loader."""

import json
import shutil
import tarfile
from itertools import islice

import pytest
import yaml
from loader_batches import TRAIN, copy, rewrite, same, samples, take

from megatron_vl.data.load.task_encoder import stop_on_error
from megatron_vl.errors import InputError


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
    wds = copy(wds_dir, tmp_path / "wds")
    with tarfile.open(wds / TRAIN[4]) as tar:
        victim = next(name for name in tar.getnames() if name.endswith(".png"))
    rewrite(wds / TRAIN[4], lambda name, data: damage(data) if name == victim else data)
    said = _drain(loaders(path=wds, num_workers=workers))
    assert f"{TRAIN[4]}/{victim.split('.')[0]}" in said
    assert what in said and "mend or remove it" in said


def test_a_sample_that_every_epoch_leaves_out_counts_once(loaders, wds_dir, tmp_path):
    wds = copy(wds_dir, tmp_path / "wds")
    with tarfile.open(wds / TRAIN[4]) as tar:
        victim = next(name for name in tar.getnames() if name.endswith(".png"))
    rewrite(wds / TRAIN[4], lambda name, data: bytes(len(data)) if name == victim else data)
    epoch, seen, skipped = len(samples(wds, TRAIN)), 0, []
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
    assert "raise seq-length, lower image-max-pixels, or remove the sample" in said
    said = _drain(loaders(packing_buffer_size=None, max_padding_length=48, num_workers=workers))
    assert "raise max-padding-length" in said


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_json_in_a_shard_is_named(loaders, wds_dir, tmp_path, workers):
    wds = copy(wds_dir, tmp_path / "wds")
    rewrite(wds / TRAIN[0], lambda name, data: b"[" * len(data) if name.endswith("json") else data)
    said = _drain(loaders(path=wds, num_workers=workers))
    assert f"sample {TRAIN[0]}/" in said and "cannot be read" in said


def test_an_empty_answer_is_named(loaders, vqa_dir, tmp_path):
    wds = copy(vqa_dir, tmp_path / "wds")
    dataset = wds / ".nv-meta/dataset.yaml"
    text = dataset.read_text()
    dataset.write_text(text.replace("answers: json[1][value]", "answers: json[1][from]"))
    rewrite(wds / TRAIN[0], lambda name, data: data.replace(b'"gpt"', b'"   "'))
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
    wds = copy(vqa_dir, tmp_path / "wds")
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
    wds = copy(wds_dir, tmp_path / "wds")
    breaks(wds)
    with pytest.raises(InputError, match=what) as caught:
        loaders(path=wds)
    assert "\n" not in str(caught.value)


def test_a_dataset_of_an_older_energon_is_read(loaders, wds_dir, tmp_path):
    wds = copy(wds_dir, tmp_path / "wds")
    info = wds / ".nv-meta/.info.json"
    info.with_suffix(".yaml").write_text(yaml.safe_dump(json.loads(info.read_text())))
    info.unlink()
    same(take(loaders(path=wds), 1)[0], take(loaders(), 1)[0])


def test_an_error_of_ours_names_its_sample():
    with pytest.raises(RuntimeError, match="sample 07-a: ZeroDivisionError: by zero"):
        stop_on_error(ZeroDivisionError("by zero"), {"__key__": "07-a"}, None)


def test_a_question_that_quotes_a_video_mark_is_named(loaders, wds_dir, tmp_path):
    wds = copy(wds_dir, tmp_path / "wds")
    mark = b"<|video_pad|>"
    rewrite(wds / TRAIN[0], lambda name, data: _with_mark(data, mark) if name.endswith("json")
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
