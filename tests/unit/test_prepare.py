import hashlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from raw_sources import entry_about, members_of, write_source

from megatron_vl.cli.main import run
from megatron_vl.data.raw import media as raw_media
from megatron_vl.data.raw.media import RawMedia
from megatron_vl.data.raw.prepare import PrepareConfig, Summary, prepare
from megatron_vl.data.raw.shards import Entry, count_shared_media, plan_shards
from megatron_vl.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


# ---- the whole command ------------------------------------------------------------------------


def test_every_question_is_a_sample_with_the_image_s_own_bytes(llava_dir, wds_dir):
    entries = json.loads((llava_dir / "train.json").read_text())
    members = members_of(wds_dir)
    assert len(members) == 2 * len(entries)
    for number, entry in enumerate(entries):
        key = f"{number:03d}-{entry['id']}"
        assert members[f"{key}.0.png"] == (llava_dir / entry["image"]).read_bytes()
        question, answer = (turn["value"] for turn in entry["conversations"])
        assert json.loads(members[f"{key}.json"]) == {
            "messages": [
                {"role": "user", "content": [
                    {"type": "image"}, {"type": "text", "text": question[len("<image>") + 1 :]},
                ]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            "media": [{"kind": "image", "files": ["0.png"], "height": 64, "width": 64,
                       "path": entry["image"]}],
        }


def test_the_same_data_give_the_same_bytes_and_their_digests_are_noted(
    llava_dir, tmp_path, monkeypatch
):
    shards = []
    for name, now in (("one", 1e9), ("two", 2e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        out = tmp_path / name
        assert run(["prepare", str(llava_dir), str(out), "--json", "train.json", "--quiet"]) == 0
        shards.append({path.name: path.read_bytes() for path in out.glob("*.tar")})
    assert len(shards[0]) == 10 and shards[0] == shards[1]
    noted = json.loads((out / ".nv-meta" / "digests.json").read_text())
    assert noted == {name: hashlib.sha256(data).hexdigest() for name, data in shards[0].items()}


def test_energon_s_metadata_has_the_media_s_sizes_and_a_validation_split(wds_dir):
    meta = wds_dir / ".nv-meta"
    dataset = yaml.safe_load((meta / "dataset.yaml").read_text())
    assert dataset["__class__"] == "CrudeWebdataset" and dataset["part_filter"] == ["json"]
    with sqlite3.connect(meta / "index.sqlite") as index:
        sizes = index.execute("SELECT metadata_type, metadata_json FROM media_metadata").fetchall()
    assert len(sizes) == len(members_of(wds_dir)) // 2
    assert {(kind, json.loads(text)["width"]) for kind, text in sizes} == {("image", 64)}
    counts = json.loads((meta / ".info.json").read_text())["shard_counts"]
    splits = yaml.safe_load((meta / "split.yaml").read_text())["split_parts"]
    assert len(counts) == 10
    assert splits["val"] == ["shard-000009.tar"]
    assert counts["shard-000009.tar"] >= 0.05 * sum(counts.values())
    assert (wds_dir / "refused.jsonl").read_text() == ""


def test_no_image_is_both_trained_and_validated_on(llava_dir, wds_dir):
    entries = json.loads((llava_dir / "train.json").read_text())
    image_of = {f"{n:03d}-{e['id']}": e["image"] for n, e in enumerate(entries)}
    shown = {"train": set(), "val": set()}
    for shard in wds_dir.glob("*.tar"):
        split = "val" if shard.name == "shard-000009.tar" else "train"
        with tarfile.open(shard) as tar:
            shown[split] |= {image_of[name.split(".")[0]] for name in tar.getnames()}
    assert shown["train"] and shown["val"] and not shown["train"] & shown["val"]


def test_refused_entries_are_listed_and_the_rest_is_kept(tmp_path, capsys):
    good = [entry_about(f"sub.dir/{n}.JPG", id=f"x.{n}/é") for n in range(10)]
    bad = [
        entry_about("absent.png"),
        entry_about("cut.png", id=7),
        entry_about(answer=" "),
        entry_about(question="<image><image>"),
        {"id": "b"},
        "text",
        entry_about("thin.png"),
        entry_about("x" * 300),
        entry_about("\ud800.png", id="\ud800"),
    ]
    source = write_source(tmp_path / "in", [*good[:5], *bad, *good[5:]],
                     ["0.png", *(e["image"] for e in good)])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    (source / "cut.png").write_bytes(file.getvalue()[:5000])
    Image.new("RGB", (402, 2)).save(source / "thin.png")

    assert run(["prepare", str(source), str(tmp_path / "out"), "--quiet"]) == 0
    lines = (tmp_path / "out/refused.jsonl").read_text().splitlines()
    refused = [json.loads(line) for line in lines]
    assert [r["entry"] for r in refused] == list(range(5, 14))
    for refusal, (reason, what) in zip(refused, (
        ("missing media", "does not exist"), ("unusable media", "cannot be decoded"),
        ("empty answer", "is empty"), ("mark count", "2 image marks for 1"),
        ("wrong shape", "conversations"), ("wrong shape", "not an object"),
        ("unusable media", "402 x 2 pixels, too long and thin"), ("missing media", "too long"),
        ("bad text", "cannot be written in UTF-8"),
    ), strict=True):  # fmt: skip
        assert refusal["reason"] == reason and what in refusal["message"], refusal
        assert refusal["file"].endswith("data.json")
        assert refusal["where"] == f"entry {refusal['entry']}"
    assert refused[1]["id"] == "7"
    names = members_of(tmp_path / "out")
    assert len(names) == 20
    assert "00-x-0-.0.jpg" in names and "18-x-9-.0.jpg" in names
    said = capsys.readouterr().out
    assert "kept 10 samples in 10 shards (9 train, 1 val)" in said
    assert "refused 9" in said
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize("words", [[], ["--json", "data.json", "in"], ["--output", "out", "in"]])
def test_the_known_command_without_its_directory_first_prints_its_usage(tmp_path, words):
    write_source(tmp_path / "in", [entry_about()] * 10)
    done = _convert(tmp_path, *words)
    assert done.returncode == 2
    assert "convert_llava_pretrain_to_wds.py LLAVA_DIR" in done.stderr
    assert done.stderr.endswith("Give LLAVA_DIR first, before any option.\n")


def test_the_known_command_writes_where_it_is_told(tmp_path):
    source = write_source(tmp_path / "in", [entry_about()] * 10)
    (source / "other.json").write_text("[]")
    done = _convert(tmp_path, "in", "--json", "data.json", "--quiet", "--output", "out")
    assert done.returncode == 0, done.stderr
    assert len(members_of(tmp_path / "out")) == 20


def _convert(cwd, *words):
    script = ROOT / "toolkits/pretrain_data_preprocessing/convert_llava_pretrain_to_wds.py"
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, cwd=cwd,
                          check=False)


# ---- what a person can get wrong --------------------------------------------------------------


def _refuses(config, what):
    with pytest.raises(InputError, match=what) as caught:
        prepare(PrepareConfig(progress=False, **config))
    assert "\n" not in str(caught.value)


def test_a_missing_source_is_named(tmp_path):
    _refuses({"source": tmp_path / "no", "output": tmp_path / "out"}, "no does not exist; give")


def test_a_media_root_that_is_not_there_is_named(tmp_path):
    source = write_source(tmp_path / "in", [entry_about()] * 10)
    _refuses({"source": source, "output": tmp_path / "out", "media_root": tmp_path / "no"},
             "--media-root .*/no is no directory; give")


@pytest.mark.parametrize("again", [False, True])
def test_told_to_end_it_leaves_nothing_half_written(tmp_path, again):
    source, out = write_source(tmp_path / "in", [entry_about()] * 2000), tmp_path / "out"
    command = [sys.executable, "-m", "megatron_vl", "prepare", source, out, "--quiet"]
    if again:
        subprocess.run(command, check=True)
        command.append("--overwrite")
    before = sorted(out.rglob("*"))
    job = subprocess.Popen(command)
    while job.poll() is None and not list(tmp_path.glob(".out.partial-*/*.tar")):
        time.sleep(0.01)
    job.terminate()
    assert job.wait(60) == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"][: 1 + again]
    assert sorted(out.rglob("*")) == before


def test_several_json_files_ask_for_a_name(tmp_path):
    source = write_source(tmp_path / "in", [entry_about()])
    (source / "other.json").write_text("[]")
    _refuses({"source": source, "output": tmp_path / "out"}, "data.json, other.json; name the one")
    config = {"source": source, "output": tmp_path / "out", "json_name": "x.json"}
    _refuses(config, "x.json does not")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('[{"id": 1,}]', "not valid JSON .line 1, column 1"),
        ("{}", "holds no list"),
        ("[]", "holds no list"),
        ("\xff", "not valid JSON"),
    ],
)
def test_damaged_json_is_named(tmp_path, text, what):
    source = write_source(tmp_path / "in", [])
    (source / "data.json").write_text(text)
    _refuses({"source": source, "output": tmp_path / "out"}, what)


def test_an_existing_output_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    _refuses({"source": tmp_path, "output": tmp_path / "out"}, "exists and is not empty")
    assert (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize("output", ["in", ".", "in/images"])
@pytest.mark.parametrize("prepared", [True, False])
def test_overwriting_never_deletes_what_is_read(tmp_path, output, prepared):
    source = write_source(tmp_path / "in", [entry_about()] * 10, ["images/0.png"])
    if prepared:
        (tmp_path / output / ".nv-meta").mkdir()
    config = {"source": source / "data.json", "output": tmp_path / output, "overwrite": True,
              "media_root": source / "images"}
    _refuses(config, "holds .*, which is in use; choose another")
    assert (source / "images/0.png").exists() and (source / "data.json").exists()


def test_the_current_directory_is_not_overwritten(tmp_path, monkeypatch):
    source = write_source(tmp_path / "in", [entry_about()] * 10)
    (tmp_path / "here/.nv-meta").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    _refuses({"source": source, "output": Path(".")}, "exists and is not empty")
    _refuses({"source": source, "output": Path("."), "overwrite": True}, "which is in use")


def test_only_a_prepared_dataset_is_overwritten(tmp_path):
    source = write_source(tmp_path / "in", [entry_about()] * 10)
    write_source(tmp_path / "other", [])
    _refuses({"source": source, "output": tmp_path / "other", "overwrite": True},
             "other holds no prepared dataset")
    assert (tmp_path / "other/0.png").exists()


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_output_that_cannot_be_made_is_one_sentence(tmp_path, overwrite):
    source = write_source(tmp_path / "in", [entry_about()] * 10)
    config = {"source": source, "overwrite": overwrite}
    _refuses(config | {"output": source / "data.json"}, "data.json is a file; give a directory")
    _refuses(config | {"output": source / "data.json/wds"}, "wds cannot be written .*; free space")


def test_a_full_disk_leaves_the_old_dataset(tmp_path, monkeypatch):
    source, out = write_source(tmp_path / "in", [entry_about()] * 10), tmp_path / "out"
    (out / ".nv-meta").mkdir(parents=True)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_vl.data.raw.prepare.write_shards", full)
    _refuses({"source": source, "output": out, "overwrite": True}, "No space left on device")
    assert (out / ".nv-meta").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_nothing_usable_names_the_first_reason(tmp_path):
    source = write_source(tmp_path / "in", [entry_about("absent.png")])
    _refuses({"source": source, "output": tmp_path / "out"}, "none of the 1 entries .*absent.png")


def _killed(media):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_media, "measure", _killed)
    monkeypatch.setattr(raw_media, "_CHUNK", 1)
    source = write_source(tmp_path / "in", [entry_about(), entry_about("1.png")],
                          ["0.png", "1.png"])
    _refuses({"source": source, "output": tmp_path / "out"},
             "was killed at .*0.png or after it, .* fewer --num-workers")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_strict_refuses_the_whole_for_one_entry(tmp_path):
    source = write_source(tmp_path / "in", [entry_about(), entry_about("absent.png")])
    _refuses({"source": source, "output": tmp_path / "out", "strict": True}, "1 of 2 entries")
    assert not (tmp_path / "out").exists()


def test_too_few_samples_for_the_split_is_an_error(tmp_path):
    source = write_source(tmp_path / "in", [entry_about()] * 9)
    _refuses({"source": source, "output": tmp_path / "out"}, "at least 10 samples but 9")


@pytest.mark.parametrize("split", ["9,1", "a,b,c", "0,0,1", "-1,1,1", "1/0,1,1"])
def test_a_bad_split_is_refused(tmp_path, split):
    _refuses({"source": tmp_path, "output": tmp_path / "o", "split": split}, "give the shares")


def test_an_unknown_format_is_refused(tmp_path):
    config = {"source": tmp_path, "output": tmp_path / "o", "format": "x"}
    _refuses(config, "must be one of: alpaca, .* llava")


# ---- shards -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "options", "parts"),
    [
        (1000, {}, {"train": 9, "val": 1}),
        (1000, {"samples_per_shard": 50}, {"train": 18, "val": 2}),
        (1000, {"split": "8,1,1"}, {"train": 8, "val": 1, "test": 1}),
        (1000, {"split": "1,0,0"}, {"train": 1}),
        (1000, {"split": "98,2,0", "samples_per_shard": 900}, {"train": 49, "val": 1}),
        (1000, {"split": "7,2,1", "shuffle": False}, {"train": 7, "val": 2, "test": 1}),
        (10, {}, {"train": 9, "val": 1}),
    ],
)
def test_the_shards_follow_the_split_and_hold_every_entry_once(tmp_path, count, options, parts):
    config = PrepareConfig(source=tmp_path, output=tmp_path / "o", **options)
    entries = [_shown(n, tmp_path / f"{n // 7}.png") for n in range(count)]
    shards, found = _plan(entries, config)
    assert {name: len(shards) for name, shards in found.items()} == parts
    assert sorted(e.number for shard in shards for e in shard) == list(range(count))
    assert all(shards)
    assert max(map(len, shards)) <= config.samples_per_shard + 7
    assert _plan(entries, config) == (shards, found), "the same seed gives the same shards"


def _shown(number, *paths):
    media = tuple(RawMedia(kind="image", files=(path,)) for path in paths)
    return Entry(number=number, name=None, turns=(), media=media)


def _plan(entries, config):
    return plan_shards(
        entries, shares=config.shares, samples_per_shard=config.samples_per_shard,
        seed=config.seed if config.shuffle else None,
    )


@pytest.mark.parametrize(
    ("images", "shuffle", "shared"),
    [([5] * 20, True, 0), ([5] * 20, False, 0), ([7] * 15, False, 1), ([100], True, 1)],
)
def test_images_in_two_splits_are_counted_and_told(tmp_path, images, shuffle, shared):
    config = PrepareConfig(source=tmp_path, output=tmp_path / "o", shuffle=shuffle)
    paths = [tmp_path / f"{n}.png" for n, times in enumerate(images) for _ in range(times)]
    entries = [_shown(n, path) for n, path in enumerate(paths)]
    assert count_shared_media(*_plan(entries, config)) == shared
    said = str(Summary(output=tmp_path, kept=len(entries), refused=(), samples={"train": 1},
                       shards=1, media={"image": 3}, shared_media=shared))
    assert ("images that more than one split shows: 1" in said) == bool(shared)


def test_entries_that_share_any_image_stay_together(tmp_path):
    """A chain: each of ten entries shows an image of the one before."""
    config = PrepareConfig(source=tmp_path, output=tmp_path / "o")
    entries = [_shown(10 * chain + n, tmp_path / f"{chain}-{n}", tmp_path / f"{chain}-{n + 1}")
               for chain in range(30) for n in range(10)]
    assert count_shared_media(*_plan(entries, config)) == 0
