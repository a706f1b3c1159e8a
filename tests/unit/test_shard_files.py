"""Samples read without their media, against energon's own reader of the same shards."""

import io
import os
import resource
import shutil
import struct
import tarfile

import pytest
from energon_prepare import energon_prepare
from megatron.energon.epathlib import EPath

from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.load.shard_files import PLACES, SampleReader, ShardFiles, note_places
from megatron_vl.errors import InputError
from megatron_vl.models import family
from megatron_vl.models.media import BadMedia

SHARD = "shard-000000.tar"
LONG = "a-key-longer-than-the-first-field-of-a-header-" * 3


def readers(wds, part_filter=None):
    """energon's reader of the training split, and the one that takes its place."""
    from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
    from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

    shards = WebdatasetMeta.from_config(path=EPath(wds), split_part="train").shards
    theirs = ShardInfosITarReader(
        EPath(wds), shards, part_filter=part_filter,
        sample_filter=lambda name: not name.endswith("/excluded"),
    )
    return theirs, SampleReader(theirs)


def pack(wds, *shards):
    """Shards of members, each in a format of its own, which energon indexes."""
    wds.mkdir()
    for number, (format, members) in enumerate(shards):
        with tarfile.open(wds / f"shard-{number:06d}.tar", "w", format=format) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                if data is None:
                    info.type = tarfile.DIRTYPE
                else:
                    info.size = len(data)
                tar.addfile(info, io.BytesIO(data or b""))
    energon_prepare(wds, {"train": range(len(shards))})
    return wds


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three samples of a JSON and an image."""
    return pack(tmp_path_factory.mktemp("three") / "wds", (tarfile.USTAR_FORMAT, [
        (f"{number}.{part}", data) for number in range(3)
        for part, data in (("json", b'{"a": %d}' % number), ("0.png", bytes([number]) * 9_000))
    ]))


@pytest.fixture
def wds(three, tmp_path):
    """A copy of them to damage."""
    return shutil.copytree(three, tmp_path / "copy")


@pytest.mark.parametrize("part_filter", [None, lambda part: part == "json"], ids=["all", "json"])
def test_samples_are_those_of_energons_reader(wds_dir, part_filter):
    theirs, ours = readers(wds_dir, part_filter)
    assert len(ours) == len(theirs) > 100
    for index in range(len(theirs)):
        want, have = theirs[index], ours[index]
        shard, places = have.pop(PLACES)
        assert have == want
        with open(shard, "rb") as file:
            for extension, (offset, size) in places.items():
                file.seek(offset)
                data = file.read(size)
                assert data == want.get(extension, data) and len(data) == size
        assert {"json"} <= {*places} and len(places) == 2


def test_shards_of_every_kind_are_read_alike(tmp_path):
    ustar, gnu, pax = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT
    theirs, ours = readers(pack(
        tmp_path / "wds",
        (ustar, [("plain.json", b"{}"), ("plain.0.png", b"x")]),
        (pax, [(f"{LONG}1.json", b"{}"), (f"{LONG}1.0.png", b"x")]),
        (gnu, [(f"{LONG}2.json", b"{}"), (f"{LONG}2.0.png", b"x")]),
        (ustar, [(f"{'d' * 60}/{'k' * 60}.json", b"{}")]),  # a name in two fields
        (ustar, [("d", None), ("d/a.json", b"{}"), ("d/b.json", b"{}")]),
        (gnu, [("\u00e9.json", b"{}"), ("\u00e9.1.png", b"")]),
        (ustar, [("a.json", b"{}"), ("excluded.json", b"{}"), ("z.json", b"{}")]),
        (ustar, [("L.json", b" " * 70_000 + b"1"), ("L.0.png", b"y" * 70_000), ("M.txt", b"")]),
    ))
    keys = []
    for index in range(len(theirs)):
        want, have = theirs[index], ours[index]
        assert (have is None) == (want is None)
        if have is not None:
            shard, places = have.pop(PLACES)
            assert have == want
            keys.append(key := want["__key__"])
            for extension in (one for one in want if not one.startswith("__")):
                assert ShardFiles().read(key, (shard, places), extension) == want[extension]
    assert keys == ["plain", f"{LONG}1", f"{LONG}2", f"{'d' * 60}/{'k' * 60}", "d/a", "d/b",
                    "\u00e9", "a", "z", "L", "M"]


def _overwrite(wds, at, data):
    with (wds / SHARD).open("r+b") as file:
        file.seek(at)
        file.write(data)


def _header(wds, at, **fields):
    """Another header, with a checksum that is right."""
    with (wds / SHARD).open("r+b") as file:
        file.seek(at)
        block = bytearray(file.read(512))
        for name, data in fields.items():
            begin = {"size": 124, "kind": 156}[name]
            block[begin : begin + len(data)] = data
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        file.seek(at)
        file.write(block)


DAMAGES = {
    "a checksum": lambda wds: _overwrite(wds, 148, b"0000000\0"),
    "no header": lambda wds: _overwrite(wds, 0, b"x" * 512),
    "zeros": lambda wds: _overwrite(wds, 0, b"\0" * 512),
    "a size beyond the sample": lambda wds: _header(wds, 0, size=b"77777777777\0"),
    "no size": lambda wds: _header(wds, 0, size=b"zzzzzzzzzzz\0"),
    "a size below zero": lambda wds: _header(wds, 0, size=b"-0000000005\0"),
    "a header cut off": lambda wds: (wds / SHARD).open("r+b").truncate(400),
    "a link": lambda wds: _header(wds, 0, kind=b"2"),
    "another's key": lambda wds: _overwrite(wds, 1024, b"1.0.png") or _header(wds, 1024),
    "an end": lambda wds: (wds / SHARD).open("r+b").truncate(700),
    "an index beyond the shard": lambda wds: (wds / f"{SHARD}.idx").write_bytes(
        struct.pack("QQQQ", 0, 2**62, 2**63, 2**64 - 1)),
    "a short index": lambda wds: (wds / f"{SHARD}.idx").write_bytes(struct.pack("Q", 0)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_damaged_shards_is_read_what_energon_reads_and_the_rest_is_named(wds, damage, three):
    def outcome(reader, index):
        try:
            return {key: value for key, value in reader[index].items()
                    if key not in (PLACES, "__sources__")}
        except InputError as error:
            assert str(wds / SHARD) in str(error) and f"sample {index} (from 0)" in str(error)
        except Exception:
            assert reader is not ours

    DAMAGES[damage](wds)
    theirs, ours = readers(wds)
    for index in range(3):
        assert outcome(ours, index) == outcome(theirs, index)
    whole, _ = readers(three)
    assert any(outcome(theirs, index) != outcome(whole, index) for index in range(3))


@pytest.mark.parametrize("at", [0, 1024])
def test_a_file_of_a_size_below_zero_is_not_read_again_for_ever(wds, at):
    """Python's tarfile goes back to where it was, and energon with it."""
    _header(wds, at, size=b"-0000001000\0")
    _, ours = readers(wds)
    with pytest.raises(InputError, match="a size below zero"):
        ours[0]
    assert ours[1]["json"] == b'{"a": 1}'


def test_what_is_no_damage_is_not_called_so(wds, monkeypatch):
    _, ours = readers(wds)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(InputError, match=r"Too many open files.*raise the limit on open"):
            ours[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    (wds / SHARD).unlink()
    with pytest.raises(InputError, match="No such file .*see that the disk is there"):
        ours[0]


def test_a_member_may_be_named_as_what_is_added_to_a_sample(tmp_path):
    _, ours = readers(pack(tmp_path / "wds", (tarfile.USTAR_FORMAT, [
        ("0.json", b"{}"), (f"0.{PLACES}", b"x"), ("1.json", b"{}"), ("1.__key__", b"x")])))
    assert ours[0][PLACES][1].keys() == {"json", PLACES}
    with pytest.raises(InputError, match="sample 1 .* cannot be read"):
        ours[1]


def test_a_run_names_the_shard_that_is_damaged(wds_dir, hf_dir, spec, tmp_path):
    copy = shutil.copytree(wds_dir, tmp_path / "copy")
    for path in copy.glob("*.tar"):
        with path.open("r+b") as file:
            file.seek(148)
            file.write(b"0000000\0")
    for workers in (0, 1):
        config = DataConfig(train=Mixture.parse(str(copy)), seq_length=512, num_workers=workers)
        with pytest.raises(InputError, match=r"sample 0 \(from 0\) of the shard .*bad checksum"):
            for _ in build_train_loader(
                config, hf_dir=hf_dir, spec=spec, family=family(spec.model_type)
            ):
                pass


def test_a_reader_remembers_no_header_it_has_passed(wds_dir):
    """Python's tarfile keeps every one."""
    _, ours = readers(wds_dir)
    for index in range(len(ours)):
        ours[index]
    assert ours.itar_files_cache
    assert sum(len(tar.members) for tar in ours.itar_files_cache.values()) < 20


def test_readers_of_many_datasets_share_the_files_that_may_be_open(wds):
    class End:
        def __init__(self):
            self.join_readers = [readers(wds)[0]]

    class Mixture:
        datasets = tuple(End() for _ in range(10))

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, before[1]))
    try:
        note_places(Mixture)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for end in Mixture.datasets:
        (reader,) = end.join_readers
        assert isinstance(reader, SampleReader) and reader.itar_cache_size == 2


# ---- single files --------------------------------------------------------------------------------


def test_a_file_is_read_by_its_place(wds):
    _, ours = readers(wds)
    files = ShardFiles(max_open=1)
    reads = [files.reader(str(number), ours[number][PLACES]) for number in range(3)]
    assert [read("0.png") for read in reads] == [bytes([number]) * 9_000 for number in range(3)]


def test_a_file_of_a_shard_that_is_elsewhere_is_read_through_energon(wds):
    shard, places = readers(wds)[1][1][PLACES]
    assert ShardFiles().read("1", (EPath(shard), places), "0.png") == b"\1" * 9_000
    with pytest.raises(BadMedia, match="the shard .* ends within its file"):
        ShardFiles().read("1", (EPath(shard), {"0.png": (0, 2**40)}), "0.png")


def test_a_file_that_is_not_there_is_named(wds):
    places = readers(wds)[1][0][PLACES]
    with pytest.raises(BadMedia, match=r"its file 0\.1\.png is not in"):
        ShardFiles().read("0", places, "1.png")


@pytest.mark.parametrize("size", [2**62, 2**40, -5])
def test_who_asks_for_all_memory_gets_what_is_there(wds, size):
    shard, places = readers(wds)[1][0][PLACES]
    with pytest.raises(BadMedia, match="the shard .* ends within its file"):
        ShardFiles().read("0", (shard, {"0.png": (places["0.png"][0], size)}), "0.png")


@pytest.mark.parametrize("offset", [2**62, 2**80])
def test_a_place_behind_the_shard_is_named(wds, offset):
    shard, _ = readers(wds)[1][0][PLACES]
    with pytest.raises(BadMedia, match=r"0\.0\.png"):
        ShardFiles().read("0", (shard, {"0.png": (offset, 5)}), "0.png")


def test_a_shard_that_is_gone_is_named(wds):
    places = readers(wds)[1][0][PLACES]
    (wds / SHARD).unlink()
    with pytest.raises(BadMedia, match=r"its file 0\.0\.png cannot be read"):
        ShardFiles().read("0", places, "0.png")


def test_files_are_closed_with_who_opened_them_and_no_more_are_open_than_told(wds):
    def opened():
        return sum(os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(wds))
                   for fd in os.listdir("/proc/self/fd"))

    files = ShardFiles(max_open=2)
    for part in (SHARD, f"{SHARD}.idx", ".nv-meta/split.yaml", ".nv-meta/dataset.yaml", SHARD):
        assert files.read("0", (wds / part, {"x": (0, 4)}), "x")
        assert opened() <= 2
    del files
    assert opened() == 0
