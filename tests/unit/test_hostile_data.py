"""Prepared and raw data made to do harm: it runs no code, leaves no directory, takes no memory.

Each ends in one sentence and code 2, or as one refused entry among good ones.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
import yaml
from commands import megatron_vl
from energon_prepare import energon_prepare
from hostile import DEEP, Payload, refusal

from megatron_vl.data.dataset_dir import check_dataset
from megatron_vl.data.encode import media
from megatron_vl.data.encode.media import decode_rgb, video_info
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.raw import source_files
from megatron_vl.errors import InputError
from megatron_vl.models import family
from megatron_vl.models.media import BadMedia

pytestmark = pytest.mark.usefixtures("quick_and_small")


# ---- prepared datasets ------------------------------------------------------------------------


@pytest.fixture
def wds(wds_dir, tmp_path) -> Path:
    return shutil.copytree(wds_dir, tmp_path / "wds")


CODE = "import pathlib\npathlib.Path({canary!r}).touch()\n" + "".join(
    f"def {name}(*_): pass\n" for name in ("sample_loader", "part_filter"))
CRUDE = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
VQA = {"__module__": "megatron.energon", "__class__": "VQASample"}
NAMES_CODE = {
    "a file of the dataset": {"sample_type": VQA, "sample_loader": "code.py:sample_loader",
                              "part_filter": "code.py:part_filter"},
    "a filter of the dataset": CRUDE | {"part_filter": "code.py:part_filter"},
    "a class of another module": {"__module__": "code", "__class__": "Path"},
    "a function": {"__module__": "os", "__function__": "getcwd"},
    "a type": {"sample_type": {"__module__": "subprocess", "__class__": "Popen"},
               "field_map": {"args": "json"}},
    "a module within energon's": {"__module__": "megatron.energon.module_loader",
                                  "__class__": "ModuleLoader"},
    "deep within": CRUDE | {"subflavors": [{"a": {"__function__": "getcwd"}}]},
}


@pytest.mark.parametrize("config", NAMES_CODE.values(), ids=NAMES_CODE)
def test_a_dataset_that_names_code_is_refused(config, wds, canary, capsys, hf_dir):
    (wds / ".nv-meta" / "code.py").write_text(CODE.format(canary=str(canary)))
    (wds / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(config))
    said = refusal(capsys, "lint", wds, "--model", hf_dir, "--seq-length", 256)
    assert "asks for Python code to be run" in said and "dataset.yaml" in said
    with pytest.raises(InputError, match="Python code"):
        check_dataset(wds, "train")
    assert not canary.exists()


def test_that_energon_would_run_it_is_why(wds, canary):
    """Else the test above would guard nothing."""
    from megatron.energon import WorkerConfig
    from megatron.energon.dataset_config import get_dataset_from_config

    (wds / ".nv-meta" / "code.py").write_text(CODE.format(canary=str(canary)))
    (wds / ".nv-meta" / "dataset.yaml").write_text(
        yaml.safe_dump(NAMES_CODE["a filter of the dataset"]))
    get_dataset_from_config(wds, split_part="train", worker_config=WorkerConfig(
        rank=0, world_size=1, num_workers=0))
    assert canary.exists()


def test_a_second_key_and_another_file_hide_no_code(wds):
    meta = wds / ".nv-meta"
    good = (meta / "dataset.yaml").read_text()
    (meta / "dataset.yaml").write_text("__module__: os\n" + good)
    with pytest.raises(InputError, match="dataset.yaml is not valid YAML"):
        check_dataset(wds, "train")
    (meta / "dataset.yaml").write_text(good)
    check_dataset(wds, "train")
    for name in ("other.yaml", "other.json"):
        (meta / name).write_text(json.dumps({"__module__": "os", "__function__": "getcwd"}))
        with pytest.raises(InputError, match="other.* asks for Python code"):
            check_dataset(wds, "train")
        (meta / name).unlink()


@pytest.mark.parametrize("change", [
    {"joiner": {"__module__": "evil", "__class__": "Evil"}},
    {"dataset_config": "../../evil.yaml"},
])
@pytest.mark.parametrize("nested", [False, True])
def test_a_metadataset_that_names_code_is_refused(change, nested, wds, tmp_path):
    mix = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {
        "train": {"blend": [{"weight": 1, "path": str(wds), **change}]}}}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    path = tmp_path / "mix.yaml"
    if nested:
        mix["splits"]["train"]["blend"] = [{"weight": 1, "path": "./mix.yaml"}]
        path = tmp_path / "outer.yaml"
        path.write_text(yaml.safe_dump(mix))
    with pytest.raises(InputError, match=r"mix.yaml (asks for Python|names \.\./\.\./evil)"):
        Mixture.parse(str(path)).check("train")


@pytest.mark.parametrize("shard", ["../outside.tar", "{root}/outside.tar", "a/../../outside.tar"])
def test_a_shard_outside_its_dataset_is_refused(shard, wds, tmp_path):
    shard = shard.replace("{root}", str(tmp_path))
    meta = wds / ".nv-meta"
    first = check_first(meta)
    shutil.copy(wds / first, tmp_path / "outside.tar")
    shutil.copy(wds / f"{first}.idx", tmp_path / "outside.tar.idx")
    (meta / "split.yaml").write_text(yaml.safe_dump({"split_parts": {"train": [shard]}}))
    info = json.loads((meta / ".info.json").read_text())
    (meta / ".info.json").write_text(json.dumps({**info, "shard_counts": {shard: 3}}))
    with pytest.raises(InputError, match=r"names the shard .*outside\.tar, outside"):
        check_dataset(wds, "train")


def check_first(meta: Path) -> str:
    return next(iter(json.loads((meta / ".info.json").read_text())["shard_counts"]))


@pytest.mark.parametrize("entries", [["shard-{000000..999999999}.tar"], ["{a,b}" * 40], [["a"]], 3])
def test_a_list_of_shards_without_end_is_refused(entries, wds):
    parts = {"split_parts": {"train": entries}}
    (wds / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump(parts))
    with pytest.raises(InputError, match="split.yaml (is damaged|cannot be used)"):
        check_dataset(wds, "train")


def repacked(wds: Path, change) -> None:
    """Every shard again, with `change(name, data)` -> members; and energon's index of them."""
    shards = sorted(wds.glob("*.tar"))
    for path in shards:
        with tarfile.open(path) as old:
            members = [(one.name, old.extractfile(one).read()) for one in old]
        with tarfile.open(path, "w") as new:
            for name, data in (one for member in members for one in change(*member)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                new.addfile(info, io.BytesIO(data))
    shutil.rmtree(wds / ".nv-meta")
    energon_prepare(wds, {"train": range(len(shards))})


def first_batch(wds: Path, hf_dir: Path, spec, **options):
    config = DataConfig(train=Mixture.parse(str(wds)), seq_length=512, num_workers=0,
                        packing_buffer_size=None, shuffle_buffer_size=0, **options)
    return next(iter(build_train_loader(
        config, hf_dir=hf_dir, spec=spec, family=family(spec.model_type)
    )))


@pytest.mark.parametrize("filtered", [True, False], ids=["as prepared", "every member read"])
def test_pickles_among_a_shards_members_stay_bytes(filtered, wds, hf_dir, spec, canary):
    """energon's own decoder would unpickle or load a member by its extension."""
    payload = pickle.dumps(Payload(canary))

    def change(name, data):
        yield name, data
        if name.endswith(".json"):
            for extension in ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "0.pyd"):
                yield name.replace("json", extension), payload

    repacked(wds, change)
    if not filtered:
        (wds / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(CRUDE))
    assert first_batch(wds, hf_dir, spec).num_samples == 1
    assert not canary.exists()


def test_a_pickle_in_the_place_of_an_image_stays_bytes(vqa_dir, hf_dir, spec, tmp_path, canary):
    wds = shutil.copytree(vqa_dir, tmp_path / "vqa")
    payload = pickle.dumps(Payload(canary))
    meta = (wds / ".nv-meta" / "dataset.yaml").read_text()
    repacked(wds, lambda name, data: [(name.replace(".png", ".pth"),
                                       payload if name.endswith(".png") else data)])
    (wds / ".nv-meta" / "dataset.yaml").write_text(meta.replace("png", "pth"))
    with pytest.raises(InputError, match="not in a format PIL can read"):
        first_batch(wds, hf_dir, spec)
    assert not canary.exists()


@pytest.mark.parametrize("text", [DEEP, '{"turns": ' + "9" * 100_000 + "}"])
def test_a_prepared_sample_that_cannot_be_held_is_named(text, wds, hf_dir, spec):
    # Indexed while it is well: energon's own indexing reads it too.
    repacked(wds, lambda name, data: [(name, data + b" " * 2**18 * name.endswith("json"))])
    for path in wds.glob("*.tar"):
        with tarfile.open(path) as tar:
            places = [(one.offset_data, one.size) for one in tar if one.name.endswith("json")]
        with path.open("r+b") as file:
            for offset, size in places:
                file.seek(offset)
                file.write(text.encode().ljust(size))
    with pytest.raises(InputError, match=r"sample shard-\d+\.tar/.* cannot be read"):
        first_batch(wds, hf_dir, spec)


# ---- raw data ---------------------------------------------------------------------------------


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of so many black pixels; its rows are packed a thousand to one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width // 8)) for _ in range(min(height, 1000)))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head),
                     *(chunk(*one) for one in chunks), chunk(b"IDAT", rows + packer.flush()),
                     chunk(b"IEND", b"")])


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 32 32
%%EndComments
(canary) (w) file closefile
showpage
"""
IMAGES = {
    "ten thousand million pixels": (png(100_000, 100_000), "exceeds limit"),
    "a comment that unpacks to a gigabyte": (
        png(64, 64, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28), 9))), "PIL can read"),
    "a program in PostScript": (POSTSCRIPT, "it is application/postscript, no image"),
}


def test_images_that_would_do_harm_are_refused_entries(tmp_path, canary):
    """Beside a good one, which is kept; Ghostscript is a program that tells that it was started."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (tools / "gs").chmod(0o755)
    source = tmp_path / "in"
    source.mkdir()
    entries = []
    for number, (data, _) in enumerate([*IMAGES.values(), (png(64, 64), "")]):
        (source / f"{number}.png").write_bytes(data)
        entries.append({"image": f"{number}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "black"}]})
    (source / "train.json").write_text(json.dumps(entries))
    done = megatron_vl("prepare", source, tmp_path / "out", "--split", "1,0,0", "--quiet",
                       PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert done.code == 0, done.text
    assert "kept 1 samples" in done.out and not canary.exists()
    refused = [json.loads(line) for line in
               (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert len(refused) == len(IMAGES)
    for one, (_, why) in zip(refused, IMAGES.values(), strict=True):
        assert why in json.dumps(one), one


def test_every_image_format_that_is_read_is_read_by_pil_itself():
    from PIL import Image

    Image.init()
    assert {"EPS", "WMF", "FPX"} & set(Image.OPEN) - set(media._formats())
    with pytest.raises(BadMedia):
        decode_rgb(POSTSCRIPT)


def test_a_video_of_huge_frames_is_refused_before_one_is_decoded():
    import av

    wide = io.BytesIO()
    with av.open(wide, "w", format="mov") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 8000, 6000, "gray"
        for packet in (*stream.encode(av.VideoFrame(8000, 6000, "gray")), *stream.encode()):
            container.mux(packet)
    with pytest.raises(BadMedia, match="its frames of 8000 x 6000 pixels are over 40,000,000"):
        video_info(wide.getvalue())


def tar_of(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME,
                                  tarfile.GNUTYPE_LONGLINK])
def test_a_tar_header_that_unpacks_to_gigabytes_is_refused(kind, tmp_path, capsys):
    info = tarfile.TarInfo("x")
    info.size, info.type = 2**32, kind
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(2**26)))
    said = refusal(capsys, "prepare", path, tmp_path / "out", "--format", "chatml",
                   "--quiet")
    assert "a header of 4294967296 bytes" in said and not (tmp_path / "out").exists()


def test_a_member_that_unpacks_to_gigabytes_is_a_refused_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(source_files, "MAX_BYTES", 2**20)
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(tar_of(("0.json", bytes(2**24)), ("1.json", b"[]"))))
    (_, bad), (_, good) = source_files.open_file(path).entries()
    assert "0.json has 16777216 bytes" in str(bad) and good["json"] == b"[]"


def test_tar_members_are_written_nowhere(tmp_path, canary, capsys):
    """Names that climb, and links; a shard is read as a stream."""
    (tmp_path / "in").mkdir()
    data = tar_of(("../canary.json", b"[]"), (str(canary) + ".json", b"[]"))
    link = tarfile.TarInfo("link.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    made = io.BytesIO(data)
    with tarfile.open(fileobj=made, mode="a") as tar:
        tar.addfile(link)
    (tmp_path / "in" / "a.tar").write_bytes(made.getvalue())
    before = sorted(tmp_path.rglob("*"))
    refusal(capsys, "prepare", tmp_path / "in", tmp_path / "out", "--format", "chatml", "--quiet")
    assert sorted(tmp_path.rglob("*")) == before
    entries = list(source_files.open_file(tmp_path / "in" / "a.tar").entries())
    assert len(entries) == 2, "a link is no entry"


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(source_files, "MAX_BYTES", 2**20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"[" * 2**21 + b"\n")
    with pytest.raises(InputError, match="line 2 has over 1048576 bytes"):
        list(source_files.open_file(path).entries())


def test_a_table_whose_rows_repeat_much_is_unpacked_row_by_row(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(source_files, "_AT_ONCE", 3 * 2**20)
    asked = []
    read = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda self, **options: (
        asked.append(options["batch_size"]), read(self, **options))[1])
    for length in (2**20, 8):
        path = tmp_path / f"{length}.parquet"
        parquet.write_table(pyarrow.table({"text": ["a" * length] * 64}), path,
                            compression="zstd", use_dictionary=True)
        assert path.stat().st_size < 2**14
        assert sum(1 for _ in source_files.open_file(path).entries()) == 64
    assert asked[0] < 4 and asked[1] == 32
