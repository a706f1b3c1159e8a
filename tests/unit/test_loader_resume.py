"""A loader that goes on where another stopped, and what it refuses to go on with."""

import hashlib
import json
import re
import subprocess
import sys
import time
from textwrap import dedent
from threading import Thread

import numpy as np
import pytest
from loader_batches import TRAIN, copy, rewrite, same, take
from torch.utils.data import get_worker_info

from megatron_vl.data.encode import media
from megatron_vl.data.load.loader_state import from_json, to_json
from megatron_vl.errors import InputError
from megatron_vl.models.media import BadMedia, MediaLimits


@pytest.mark.parametrize(("workers", "stops"), [
    (0, (3,)), (2, (1,)), (2, (7,)), (2, (0, 1)), (2, (7, 1, 0, 1)), (3, (8, 2, 1)),
])
def test_a_resumed_loader_goes_on_exactly(loaders, workers, stops):
    """Also where it is saved before each reading process has handed over a batch."""
    undisturbed = loaders(num_workers=workers)
    want = take(undisturbed, sum(stops) + 4)
    undisturbed.close()
    states = []
    for stop in (*stops, 4):
        loader = loaders(num_workers=workers)
        if states:
            loader.restore_state([from_json(states[-1])])
        for one in take(loader, stop):
            same(one, want.pop(0))
        states.append(to_json(loader.save_state_rank()))
        loader.close()
    assert not want


def test_a_reading_process_that_is_slow_to_start_skips_nothing(loaders, monkeypatch):
    """The question where it stands reaches it before it has begun."""
    want = take(loaders(num_workers=2), 5)
    start = Thread.start

    def start_slowly(thread):
        start(thread)
        if thread.name == "command_thread" and get_worker_info().id == 1:
            time.sleep(3)

    monkeypatch.setattr(Thread, "start", start_slowly)
    slow = loaders(num_workers=2)
    take(slow, 1)
    state = to_json(slow.save_state_rank())
    resumed = loaders(num_workers=2)
    resumed.restore_state([from_json(state)])
    for one, two in zip(want[1:], take(resumed, 4), strict=True):
        same(one, two)


def test_a_dataset_with_nothing_to_use_does_not_go_round_for_ever(loaders):
    with pytest.raises(InputError, match="again and again, as shard-.* tokens but a row holds 5"):
        next(iter(loaders(seq_length=5, max_skipped_samples=10**6)))


def test_images_that_can_never_be_decoded_do_not_go_round_for_ever(loaders, wds_dir, monkeypatch):
    def fail(data):
        raise BadMedia("its pixels cannot be decoded")

    monkeypatch.setattr(media, "decode_rgb", fail)
    with pytest.raises(InputError, match="again and again, as shard-.* cannot be decoded"):
        next(iter(loaders(max_skipped_samples=10**6)))


def test_a_program_that_keeps_its_loader_can_end(hf_dir, wds_dir):
    program = """
        import sys
        from pathlib import Path
        from megatron_vl.data.load.config import DataConfig
        from megatron_vl.data.load.loader import build_train_loader
        from megatron_vl.data.load.mixture import Mixture
        from megatron_vl.models import family, load_spec
        hf = Path(sys.argv[1])
        config = DataConfig(train=Mixture.parse(sys.argv[2]), seq_length=256, num_workers=1)
        spec = load_spec(hf)
        loader = build_train_loader(config, hf_dir=hf, spec=spec, family=family(spec.model_type))
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
    rewrite(wds / TRAIN[0], lambda name, data: data.replace(b'"text": "no"', b'"text": "NO"'))
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
    moved = copy(wds_dir, tmp_path / "moved")
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
    wds = copy(wds_dir, tmp_path / "wds")
    state = loaders(path=wds).save_state_rank()
    _retell(wds)
    with pytest.raises(InputError, match=f"the samples of {wds} are others than they were; go on"):
        loaders(path=wds).restore_state([state])


def test_damaged_digests_are_named(loaders, wds_dir, tmp_path):
    wds = copy(wds_dir, tmp_path / "wds")
    for text in ("[]", "{", ""):
        (wds / ".nv-meta/digests.json").write_text(text)
        with pytest.raises(InputError, match="digests.json .*; prepare the dataset again"):
            loaders(path=wds)


def test_a_data_state_without_its_settings_is_refused(loaders):
    loader = loaders()
    with pytest.raises(InputError, match="does not say which dataset and settings"):
        loader.restore_state([loader.save_state_rank()["state"]])
