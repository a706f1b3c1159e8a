"""Which files of a source are read, and what is made of files that are damaged."""

import builtins
import gzip
import io
import json
import pickle
import tarfile

import pytest

from megatron_vl.data.conversation import BadEntry
from megatron_vl.data.raw import source_files
from megatron_vl.data.raw.formats import Fields
from megatron_vl.data.raw.sources import open_source
from megatron_vl.errors import InputError

TURNS = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
ENTRY = {"id": 1, "image": "0.jpg", "conversations": TURNS}
PNG = b"\x89PNG\r\n\x1a\n..."


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(text, (list, dict)):
        text = json.dumps(text)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def parquet(path, rows, **options):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def shard(path, *keys):
    said, images = json.dumps(TURNS).encode(), pickle.dumps([PNG])
    return tar(path, [(f"{k}.{e}", d) for k in keys for e, d in (("jpgs", images), ("json", said))])


def opened(source, format="llava", json_name=None, dataset=None):
    return open_source(source, format=format, json_name=json_name, dataset=dataset)


def found(source):
    """(file, number, where, entry or reason) of every entry."""
    return [
        (file.name, *place, entry.reason if isinstance(entry, BadEntry) else entry)
        for file, *place, entry in source.entries()
    ]


def refused(*words, call=opened, **options):
    with pytest.raises(InputError) as caught:
        call(*words, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_reading(path, **options):
    return refused(call=lambda: list(opened(path, **options).entries()))


# ---- files ------------------------------------------------------------------------------------

A, B = {"id": "a"}, {"id": "图"}
JSON_LINES = b'{"id": "a"}\n\n  \n{"id": "\xe5\x9b\xbe"}\r\n'


@pytest.mark.parametrize(("name", "text", "where", "entries"), [
    ("a.json", [A, 7, B], ["entry 0", "entry 1", "entry 2"], [A, "wrong shape", B]),
    ("a.json", b"\xef\xbb\xbf[{}]", ["entry 0"], [{}]),
    ("a.jsonl", JSON_LINES, ["line 1", "line 4"], [A, B]),
    ("a.ndjson", b"\xef\xbb\xbf" + JSON_LINES, ["line 1", "line 4"], [A, B]),
    ("a.json", JSON_LINES, ["line 1", "line 4"], [A, B]),  # often called so
    ("a.jsonl", [A, B], ["entry 0", "entry 1"], [A, B]),
    ("a.jsonl", b'{"id": "a"}\n{"id\n\xff\n[1]\n' + b"[" * 100_000 + b"\n" + b"9" * 5000,
     [f"line {i}" for i in range(1, 7)],
     [A, "wrong shape", "bad text", "wrong shape", "wrong shape", "wrong shape"]),
])  # fmt: skip
def test_every_entry_has_its_place_in_the_file(tmp_path, name, text, where, entries):
    source = opened(write(tmp_path / name, text))
    pairs = enumerate(zip(where, entries, strict=True))
    assert found(source) == [(name, number, *pair) for number, pair in pairs]
    assert source.count() == len(entries)
    assert source.root == tmp_path


@pytest.mark.parametrize(("name", "text", "what"), [
    ("a.json", '[{"id": 1,}]', "is not valid JSON (line 1, column 1"),
    ("a.json", "", "is not valid JSON (line 1, column 1"),
    ("a.json", "{}", "holds no list of entries"),
    ("a.json", '{\n"a": 1}', "holds no list of entries"),
    ("a.json", "[]", "holds no list of entries"),
    ("a.json", b"\xff", "is not UTF-8; save it as UTF-8."),
    ("a.json", "[" * 100_000, "is not valid JSON (line 1, column 1: it is nested"),
    ("a.json", "[" + "9" * 5000 + "]", "is not valid JSON (line 1, column 1: Exceeds the"),
    ("a.parquet", "PAR1", "cannot be read ("),
    ("a.tar", "abc", "cannot be read ("),
    ("a.tgz", "abc", "cannot be read ("),
])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, name, text, what):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = write(tmp_path / name, text)
    assert refused_reading(path, format="chatml").startswith(f"{path} {what}")


# ---- parquet ----------------------------------------------------------------------------------


def test_a_table_s_images_are_the_entries_own(tmp_path):
    rows = [
        {"image": {"bytes": PNG, "path": "0.png"}, "conversations": TURNS, "more": None},
        {"image": {"bytes": None, "path": "1.png"}, "conversations": TURNS, "more": 1.5},
    ]
    source = opened(parquet(tmp_path / "a.parquet", rows * 40, row_group_size=7))
    assert [(e.number, e.where) for e in source.entries()] == [(i, f"row {i}") for i in range(80)]
    assert source.count() == 80
    media = [source.read(e.entry).media[0] for e in source.entries()]
    assert [m.data or m.path for m in media] == [(PNG,), "1.png"] * 40


def test_a_table_s_lists_of_images_and_content_are_read(tmp_path):
    image = {"type": "image", "text": None}
    said = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
    ]
    rows = [{"images": [{"bytes": PNG, "path": None}] * 2, "messages": said}]
    source = opened(parquet(tmp_path / "a.parquet", rows), format="messages")
    (entry,) = source.entries()
    assert [m.data for m in source.read(entry.entry).media] == [(PNG,)] * 2


def test_text_that_is_none_costs_its_row_alone(tmp_path):
    pa = pytest.importorskip("pyarrow")
    rows = [{"id": b"a"}, {"id": b"\xff"}, {"id": b"c"}]
    path = parquet(tmp_path / "b.parquet", rows)
    text = pa.parquet.read_table(path).column("id").chunk(0).view(pa.string())
    pa.parquet.write_table(pa.table({"id": text}), path)
    assert [entry for *_, entry in found(opened(path))] == [{"id": "a"}, "bad text", {"id": "c"}]


def test_a_table_cut_short_is_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"id": "a" * 9}] * 9, compression="gzip")
    data = path.read_bytes()
    path.write_bytes(data[:10] + b"\0" * 40 + data[50:])
    assert refused_reading(path).startswith(f"{path} cannot be read (")


def test_without_pyarrow_a_table_asks_for_it(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", "PAR1")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert refused_reading(path).endswith("run pip install pyarrow.")


# ---- tar shards -------------------------------------------------------------------------------


def test_the_samples_of_shards_follow_one_another(tmp_path):
    shard(tmp_path / "wds" / "pretrain-0.tar", "a", "b")
    shard(tmp_path / "wds" / "pretrain-1.tar", "7", "x/c")
    write(tmp_path / "wds" / "pretrain-0.tar.idx", b"\0")
    source = opened(tmp_path / "wds", format="chatml")
    entries = list(source.entries())
    assert [(e.file.name, e.number, e.where) for e in entries] == [
        ("pretrain-0.tar", 0, "sample a"), ("pretrain-0.tar", 1, "sample b"),
        ("pretrain-1.tar", 2, "sample 7"), ("pretrain-1.tar", 3, "sample x/c"),
    ]  # fmt: skip
    assert source.count() is None
    assert [e.entry["id"] for e in entries] == ["a", "b", "7", "x/c"]
    assert {source.read(e.entry).media[0].data for e in entries} == {(PNG,)}


def test_a_zipped_shard_is_read(tmp_path):
    path = shard(tmp_path / "a.tar", "a")
    (tmp_path / "b.tgz").write_bytes(gzip.compress(path.read_bytes()))
    assert len(found(opened(tmp_path / "b.tgz", format="chatml"))) == 1


def test_a_sample_without_all_its_parts_is_refused_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(source_files, "MAX_BYTES", 1000)
    said = json.dumps(TURNS).encode()
    members = [
        ("a.jpgs", b""), ("b.json", said), ("b.metadata", b"{}"), ("c.json", said),
        ("c.json", said), ("d.jpgs", b" " * 1001), ("d.json", said), ("e.json", said),
    ]  # fmt: skip
    entries = found(opened(tar(tmp_path / "a.tar", members), format="chatml"))
    assert [(where, entry) for *_, where, entry in entries] == [
        ("sample a", "wrong shape"), ("sample b", {"id": "b", "json": said}),
        ("sample c", {"id": "c", "json": said}), ("sample c", {"id": "c", "json": said}),
        ("sample d", "unusable media"), ("sample e", {"id": "e", "json": said}),
    ]  # fmt: skip


# In a header, in a member, between members, before the end's mark; and a header overwritten.
@pytest.mark.parametrize("left", [0, 300, 700, 2100, 2048, 4096, None])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_shard_cut_short_is_named(tmp_path, left, name):
    data = shard(tmp_path / "whole.tar", "a", "b").read_bytes()
    data = data[:left] if left is not None else data[:2048] + b"!" * 512 + data[2560:]
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert refused_reading(path, format="chatml").startswith(f"{path} cannot be read (")


def test_shards_are_of_chatml_alone(tmp_path):
    path = shard(tmp_path / "a.tar", "a")
    assert "give --format chatml" in refused(path)
    assert "are read with --format chatml" in refused(tmp_path)


# ---- directories ------------------------------------------------------------------------------


@pytest.mark.parametrize(("files", "options", "names"), [
    (["a.json"], {}, ["a.json"]),
    (["a.jsonl", "readme.txt", "dataset_info.json"], {}, ["a.jsonl"]),
    (["a.json", "b.json"], {"json_name": "b.json"}, ["b.json"]),
    (["x/a.json", "b.json"], {"json_name": "x/a.json"}, ["a.json"]),
    (["blip_laion_cc_sbu_558k.json", "blip_laion_cc_sbu_558k_meta.json"], {},
     ["blip_laion_cc_sbu_558k.json"]),
    (["t-00001-of-00002.parquet", "t-00000-of-00002.parquet"], {},
     ["t-00000-of-00002.parquet", "t-00001-of-00002.parquet"]),
    (["data/t-00000-of-00001.parquet"], {}, ["t-00000-of-00001.parquet"]),
    (["t-00000-of-00001.parquet", "v-00000-of-00001.parquet"],
     {"json_name": "v-*-of-00001.parquet"}, ["v-00000-of-00001.parquet"]),
    (["t-00001-of-00002.parquet"], {"json_name": "t-00001-of-00002.parquet"},
     ["t-00001-of-00002.parquet"]),
    (["b.tar", "a.tar", "a.tar.idx"], {"format": "chatml"}, ["a.tar", "b.tar"]),
    (["a.tar", "a.json"], {"format": "chatml", "json_name": "*.tar"}, ["a.tar"]),
    (["a.tar", "a.json"], {}, ["a.json"]),
])  # fmt: skip
def test_a_directory_s_one_source_is_found(tmp_path, files, options, names):
    for name in files:
        write(tmp_path / name, "[]")
    assert [path.name for path in opened(tmp_path, **options).files] == names


@pytest.mark.parametrize(("files", "options", "what"), [
    ([], {}, "{0} has no .json, .jsonl or .parquet file; name the one to read with --json."),
    (["a.json", "b.jsonl"], {}, "{0} has a.json, b.jsonl; name the one to read with --json."),
    (["a.json"], {"json_name": "x.json"}, "{0}/x.json does not exist (did you mean a.json?); give"),
    (["t-00000-of-00003.parquet", "t-00002-of-00003.parquet"], {},
     "{0} has 2 of 3 shards of t, without number 00001; download"),
    (["t-00000-of-00001.parquet", "v-00000-of-00001.parquet"], {},
     "{0} has t-*-of-00001.parquet, v-*-of-00001.parquet; name the one"),
    (["a.json"], {"format": "alpacca"}, "--format is 'alpacca'; it must be one of: alpaca, chatml"),
    (["a.json"], {"json_name": "a.json", "dataset": "a"}, "--dataset a and --json a.json both"),
    (["a.json"], {"dataset": "a"}, "{0}/dataset_info.json does not exist; give"),
])  # fmt: skip
def test_a_directory_with_none_or_several_asks(tmp_path, files, options, what):
    for name in files:
        write(tmp_path / name, "[]")
    assert refused(tmp_path, **options).startswith(what.format(tmp_path))


def test_a_missing_source_is_named(tmp_path):
    assert refused(tmp_path / "no").startswith(f"{tmp_path}/no does not exist; give the directory")


# ---- dataset_info.json ------------------------------------------------------------------------


def info(path, **datasets):
    write(path / "a.json", [ENTRY])
    write(path / "dataset_info.json", datasets)
    return path


# What LLaMA-Factory reads only where it is named, and what it reads unless others are named.
NEVER_ASKED = {"system": "", "history": ""}
NOT_NAMED = {**NEVER_ASKED, "query": "", "images": "", "videos": "", "tools": ""}


@pytest.mark.parametrize(("given", "format", "fields"), [
    ({}, "alpaca", NEVER_ASKED),
    ({"formatting": "sharegpt", "ranking": False, "split": "train", "note": ""}, "sharegpt",
     NEVER_ASKED),
    ({"columns": {"prompt": "q", "response": "a", "system": None}}, "alpaca",
     {"prompt": "q", "response": "a", **NOT_NAMED}),
    ({"columns": {"query": "q", "system": "s"}}, "alpaca",
     {**NOT_NAMED, "prompt": "", "query": "q", "system": "s"}),
    ({"formatting": "sharegpt", "columns": {"messages": "talk", "images": "pics"},
      "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
               "assistant_tag": "assistant"}}, "sharegpt",
     {**NOT_NAMED, "messages": "talk", "images": "pics", "role_tag": "role",
      "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}),
    ({"formatting": "openai", "hf_hub_url": "a/b"}, "messages", NEVER_ASKED),
])  # fmt: skip
def test_a_dataset_says_its_format_and_columns(tmp_path, given, format, fields):
    info(tmp_path, mine={"file_name": "a.json", **given})
    for source in (tmp_path, tmp_path / "dataset_info.json"):
        source = opened(source, dataset="mine")
        assert (source.format, source.fields) == (format, Fields(**fields))
        assert (source.files, source.root) == ((tmp_path / "a.json",), tmp_path)


def test_a_dataset_may_be_a_directory(tmp_path):
    info(tmp_path, mine={"file_name": "part"})
    for name in ("1.jsonl", "0.json"):
        write(tmp_path / "part" / name, [ENTRY])
    source = opened(tmp_path, dataset="mine")
    assert [path.name for path in source.files] == ["0.json", "1.jsonl"]
    assert (source.count(), source.root) == (2, tmp_path)


def test_several_files_name_the_datasets_too(tmp_path):
    info(tmp_path, one={"file_name": "a.json"}, two={"file_name": "b.json"}, hub={"hf_hub_url": ""})
    write(tmp_path / "b.json", [ENTRY])
    assert refused(tmp_path).endswith("with --json, or with --dataset one of: one, two.")


@pytest.mark.parametrize(("given", "what"), [
    ("a.json", "cannot be read (it is 'a.json': it must be a table"),
    ({}, "has no file_name"),
    ({"file_name": "no.json"}, "does not exist"),
    ({"file_name": "a.json", "formatting": "llava"}, "has the formatting 'llava'; it must be"),
    ({"file_name": "a.json", "formating": "alpaca"}, "has 'formating'; did you mean 'formatting'?"),
    ({"file_name": "a.json", "columns": {"mesages": "a"}},
     "has 'mesages' in columns; did you mean 'messages'?"),
    ({"file_name": "a.json", "columns": {"messages": 7}}, "columns.messages is 7: it must be"),
    ({"file_name": "a.json", "columns": ["a"]}, "columns is ['a']: it must be a table"),
    ({"file_name": "a.json", "tags": {"user": "a"}}, "has 'user' in tags; did you mean 'user"),
    ({"file_name": "a.json", "columns": {"audios": "a"}}, "audio cannot be trained on; remove it"),
    ({"file_name": "a.json", "columns": {"kto_tag": "a"}}, "preferences are not trained on"),
    ({"file_name": "a.json", "ranking": True}, "is a preference dataset (ranking)"),
    ({"file_name": "a.json", "num_samples": 5}, "asks for num_samples"),
    ({"script_url": "a"}, "is loaded by a script (script_url), which is not run"),
    ({"hf_hub_url": "a/b"}, "is not on this machine (hf_hub_url: a/b); download it"),
])  # fmt: skip
def test_a_dataset_that_cannot_be_followed_says_why(tmp_path, given, what):
    info(tmp_path, mine=given)
    message = refused(tmp_path, dataset="mine")
    assert what in message
    assert f"dataset 'mine' of {tmp_path / 'dataset_info.json'}" in message


def test_a_dataset_that_is_not_there_has_a_neighbour(tmp_path):
    info(tmp_path, coco={}, vqa={})
    message = refused(tmp_path, dataset="cocoa")
    assert message.endswith("'cocoa'; did you mean 'coco'? it must be one of: coco, vqa.")


@pytest.mark.parametrize(("text", "what"), [("{", "is not valid JSON"), ("[]", "cannot be used")])
def test_a_damaged_dataset_info_is_named(tmp_path, text, what):
    write(tmp_path / "dataset_info.json", text)
    assert refused(tmp_path, dataset="a").startswith(f"{tmp_path / 'dataset_info.json'} {what}")
