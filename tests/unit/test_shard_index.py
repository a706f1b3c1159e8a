"""The index that `prepare` writes is the one that `energon prepare` makes of the same shards."""

import json
import shutil
import sqlite3

import pytest
import yaml
from braceexpand import braceexpand
from energon_prepare import energon_prepare
from mixed_data import write_source
from PIL import Image

from megatron_vl.cli.main import run

TABLES = {
    "samples": "tar_file_id, sample_key, sample_index, byte_offset, byte_size",
    "sample_parts": "tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size",
    "media_metadata": "entry_key, metadata_type, metadata_json",
    "media_filters": "strategy, patterns",
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A dataset of images of many formats, videos and text; and its copy, indexed by energon."""
    root = tmp_path_factory.mktemp("index")
    write_source(root / "in", copies=1)
    (json_file,) = (root / "in").glob("*.json")
    entries = json.loads(json_file.read_text())
    palette = Image.new("P", (30, 20))
    for number, (format, image) in enumerate((
        ("GIF", palette), ("TIFF", Image.new("I;16", (8, 9))), ("PNG", Image.new("RGBA", (5, 6))),
        ("BMP", Image.new("1", (40, 8))), ("WEBP", Image.new("RGB", (7, 7))),
        ("PPM", Image.new("L", (3, 3))), ("JPEG2000", Image.new("RGB", (64, 32))),
        ("JPEG", Image.new("CMYK", (16, 8))), ("TGA", Image.new("RGB", (4, 4))),
    )):  # fmt: skip
        image.save(root / "in" / f"more-{number}", format)
        entries.append({"messages": [{"role": "user", "content": "<image>?"},
                                     {"role": "assistant", "content": "x"}],
                        "images": [f"more-{number}"]})
    json_file.write_text(json.dumps(entries))
    assert run(["prepare", str(root / "in"), str(root / "ours"), "--format", "sharegpt", "--split",
                "6,3,1", "--quiet", "--samples-per-shard", "3"]) == 0
    assert (root / "ours" / "refused.jsonl").read_text() == ""
    shutil.copytree(root / "ours", root / "theirs",
                    ignore=shutil.ignore_patterns(".nv-meta", "*.idx"))
    splits = yaml.safe_load((root / "ours/.nv-meta/split.yaml").read_text())["split_parts"]
    parts, begin = {}, 0
    for name, patterns in splits.items():
        shards = [one for pattern in patterns for one in braceexpand(pattern)]
        parts[name] = range(begin, begin := begin + len(shards))
    energon_prepare(root / "theirs", parts)
    return root / "ours", root / "theirs"


@pytest.mark.parametrize("table", TABLES)
def test_the_tables_hold_the_same_rows(both, table):
    rows = []
    for wds in both:
        with sqlite3.connect(wds / ".nv-meta" / "index.sqlite") as index:
            rows.append(sorted(index.execute(f"SELECT {TABLES[table]} FROM {table}")))
    assert rows[0] and rows[0] == rows[1]


def test_the_files_beside_the_tables_are_the_same(both):
    ours, theirs = ({str(path.relative_to(wds)): path.read_bytes() for path in wds.rglob("*")
                     if path.is_file()} for wds in both)
    apart = {".nv-meta/index.sqlite", ".nv-meta/index.uuid", ".nv-meta/digests.json"}
    assert ours.keys() - apart == theirs.keys() - apart
    assert [name for name in theirs.keys() - apart if ours[name] != theirs[name]] == []
    assert len(ours[".nv-meta/index.uuid"]) == len(theirs[".nv-meta/index.uuid"])


def test_the_tables_are_made_alike(both):
    made = []
    for wds in both:
        with sqlite3.connect(wds / ".nv-meta" / "index.sqlite") as index:
            made.append(sorted(index.execute("SELECT name, sql FROM sqlite_master")))
    assert made[0] == made[1]


@pytest.mark.parametrize("small_disk", ["32k"], indirect=True)
def test_a_disk_that_is_full_for_the_index_is_one_sentence(small_disk, tmp_path, capsys):
    entries = [{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]}]
    (tmp_path / "data.json").write_text(json.dumps(entries * 10))
    assert run(["prepare", str(tmp_path / "data.json"), str(small_disk / "out"), "--split",
                "1,0,0", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "out cannot be written (database or disk is full)" in said and "Traceback" not in said
    assert not list(small_disk.iterdir())


def test_images_are_told_as_energon_reads_them(both):
    with sqlite3.connect(both[0] / ".nv-meta" / "index.sqlite") as index:
        told = [json.loads(text) for (text,) in index.execute(
            "SELECT metadata_json FROM media_metadata WHERE metadata_type = 'image'")]
    assert {one["format"] for one in told} >= {"GIF", "TIFF", "PNG", "BMP", "WEBP", "JPEG"}
    assert {one["mode"] for one in told} >= {"P", "RGBA", "1", "CMYK"}
