"""Several datasets read as one: by comma, by weight, by energon's metadataset."""

import json
import shutil
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import yaml

from megatron_vl.data.dataset_dir import split_shards
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader, build_valid_loader
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.errors import InputError
from megatron_vl.models import family


@pytest.fixture
def read(hf_dir, spec):
    """Names of the first samples of a mixture's training, or of all of its validation."""

    def read(mixture, count=None, **options):
        config = DataConfig(train=mixture, valid=mixture, seq_length=512, num_workers=0,
                            packing_buffer_size=None, shuffle_buffer_size=0, **options)
        build = build_train_loader if count else build_valid_loader
        loader = build(config, hf_dir=hf_dir, spec=spec, family=family(spec.model_type))
        return [key for batch in islice(loader, count) for key in batch.sample_keys]

    return read


def samples(wds, split, dataset=""):
    """Keys of the samples of a split, with their shards, and with what tells datasets apart."""
    found = []
    for shard in split_shards(wds, split):
        with tarfile.open(wds / shard) as tar:
            found += [f"{dataset}{shard}/{n[:-5]}" for n in tar.getnames() if n.endswith(".json")]
    return found


def of_two(wds, split):
    """Both datasets of these tests are called `wds`, in folders of other names."""
    return samples(wds, split, f"{wds.parent.name}/wds/")


@pytest.mark.parametrize(
    ("text", "paths", "weights"),
    [
        ("a", ["a"], None),
        ("a,b", ["a", "b"], None),
        (" a , b,c", ["a", "b", "c"], None),
        ("0.3,a,0.7,b", ["a", "b"], (0.3, 0.7)),
        ("1,a", ["a"], (1.0,)),
        ("mix.yaml", ["mix.yaml"], None),
    ],
)
def test_a_list_is_read_as_people_write_it(text, paths, weights):
    mixture = Mixture.parse(text)
    assert mixture.paths == tuple(map(Path, paths)) and mixture.weights == weights


@pytest.mark.parametrize(
    ("text", "options", "what"),
    [
        ("a,,b", {}, "has an empty entry"),
        ("0.3,a,b", {}, "mixes weights and paths out of turn"),
        ("a,0.3,b,0.7", {}, "mixes weights and paths out of turn"),
        ("0,a,1,b", {}, "weight of a is 0.0; give a number above 0"),
        ("a,b,a", {}, "the dataset a is given twice"),
        ("a,mix.yaml", {}, "holds a metadataset"),
        ("a", {"max_samples": 0}, "max-samples is 0"),
        ("mix.yaml", {"max_samples": 5}, r"subset: {range: \[0, 5\]}"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(text, options, what):
    with pytest.raises(InputError, match=what):
        Mixture.parse(text, **options)


def test_a_directory_with_a_comma_in_its_name_is_one_dataset(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert Mixture.parse(str(tmp_path / "a,b")).paths == (tmp_path / "a,b",)


def test_an_epoch_of_a_list_has_every_sample_of_every_dataset_once(read, wds_dir, mixed_dir):
    mixture = Mixture.parse(f"{wds_dir},{mixed_dir}")
    both = of_two(wds_dir, "train") + of_two(mixed_dir, "train")
    assert Counter(read(mixture, len(both))) == Counter(both)
    valid = of_two(wds_dir, "val") + of_two(mixed_dir, "val")
    assert Counter(read(mixture)) == Counter(valid)


def test_weights_set_the_share_of_each_dataset(read, wds_dir, mixed_dir):
    seen = read(Mixture.parse(f"1,{wds_dir},3,{mixed_dir}"), 400)
    share = sum(key in set(of_two(mixed_dir, "train")) for key in seen) / len(seen)
    assert 0.68 < share < 0.82  # three standard deviations of 400 draws


def test_max_samples_reads_the_first_of_each_dataset(read, wds_dir, mixed_dir):
    mixture = Mixture.parse(f"{wds_dir},{mixed_dir}", max_samples=20)
    assert mixture.check("train") == {wds_dir: 20, mixed_dir: 20}
    first = of_two(wds_dir, "train")[:20] + of_two(mixed_dir, "train")[:20]
    assert Counter(read(mixture, 80)) == Counter(first * 2)
    whole = Mixture.parse(str(wds_dir), max_samples=10**9)
    assert whole.check("train") == {wds_dir: len(samples(wds_dir, "train"))}


def test_a_metadataset_is_read_as_energon_does(read, wds_dir, mixed_dir, tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text(yaml.safe_dump({
        "__module__": "megatron.energon", "__class__": "MetadatasetV2",
        "splits": {
            "train": {"blend_epochized": [
                {"path": str(wds_dir), "repetitions": 1},
                {"path": str(mixed_dir), "repetitions": 2},
            ]},
            "val": {"path": str(wds_dir)},
        },
    }))  # fmt: skip
    mixture = Mixture.parse(str(path))
    want = of_two(wds_dir, "train") + 2 * of_two(mixed_dir, "train")
    assert Counter(read(mixture, len(want))) == Counter(want)
    assert Counter(read(mixture)) == Counter(samples(wds_dir, "val"))
    path.write_text(json.dumps({"splits": {"train": 5}}))
    with pytest.raises(InputError, match="mix.yaml cannot be used for its split 'train'"):
        mixture.check("train")
    path.unlink()
    with pytest.raises(InputError, match="mix.yaml does not exist"):
        mixture.check("train")


def test_samples_of_one_name_in_two_datasets_are_two(hf_dir, spec, wds_dir, tmp_path):
    copies = [shutil.copytree(wds_dir, tmp_path / name) for name in ("one", "two")]
    config = DataConfig(train=Mixture(paths=tuple(copies)), seq_length=46, num_workers=0,
                        max_skipped_samples=1000)
    loader = build_train_loader(config, hf_dir=hf_dir, spec=spec, family=family(spec.model_type))
    skipped = [one for batch in islice(loader, 1000) for one in batch.skipped]
    first = Counter(one.sample for one in skipped if one.first)
    assert set(first.values()) == {1} and len(skipped) > len(first), "more than an epoch"
    of_one = {name.removeprefix("one/") for name in first if name.startswith("one/")}
    of_two = {name.removeprefix("two/") for name in first if name.startswith("two/")}
    assert of_one == of_two < set(samples(wds_dir, "train")) and len(first) == 2 * len(of_one) > 0


@pytest.mark.parametrize(("paths", "names"), [
    (["a"], []),
    (["a", "b"], ["a", "b"]),
    (["a/wds", "b/wds"], ["a/wds", "b/wds"]),
    (["a/x/wds", "b/x/wds", "b/y/wds"], ["a/x/wds", "b/x/wds", "b/y/wds"]),
    (["x/a", "../b/"], ["a", "b"]),
])
def test_datasets_are_told_apart_by_the_ends_of_their_paths(paths, names):
    mixture = Mixture(paths=tuple(map(Path, paths)))
    found = mixture.names("train")
    assert list(found.values()) == names
    assert all(path.endswith(name) and path[0] == "/" for path, name in found.items())


def test_what_is_mixed_and_how_is_known_again_wherever_it_lies(wds_dir, mixed_dir, tmp_path):
    moved = shutil.copytree(wds_dir, tmp_path / "moved")
    one, two = Mixture.parse(f"{wds_dir},{mixed_dir}"), Mixture.parse(f"{moved},{mixed_dir}")
    assert one.fingerprint() == two.fingerprint()
    others = [f"{mixed_dir},{wds_dir}", f"1,{wds_dir},2,{mixed_dir}", str(wds_dir)]
    marks = {Mixture.parse(text).fingerprint() for text in others}
    marks.add(Mixture.parse(f"{wds_dir},{mixed_dir}", max_samples=9).fingerprint())
    assert len(marks | {one.fingerprint()}) == 5
