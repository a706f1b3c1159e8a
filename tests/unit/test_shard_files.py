"""Samples read from shards as bytes, against energon's own reader of the same shards."""

import io
import os
import random
import resource
import shutil
import sqlite3
import struct
import tarfile

import pytest
import torch
from energon_prepare import energon_prepare
from megatron.energon import WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.rng import WorkerRng

from megatron_vl.data.loader import DataConfig, build_train_loader, build_valid_loader
from megatron_vl.data.media import BadMedia
from megatron_vl.data.mixture import Mixture
from megatron_vl.data.shard_files import PLACES, LocalShards, ShardFiles, SliceRng, TarReaders
from megatron_vl.errors import InputError

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
    return theirs, LocalShards(theirs, ShardFiles())


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
    assert not ours.itar_files_cache, "energon's way was taken"


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
    quick = []
    for index in range(len(theirs)):
        want, have = theirs[index], ours[index]
        assert (have is None) == (want is None)
        if have is not None:
            quick += [have["__key__"]] * (have.pop(PLACES, None) is not None)
            assert have == want
    assert quick == ["plain", "d/a", "d/b", "\u00e9", "a", "z", "L", "M"]


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


def test_a_member_named_as_what_energon_adds_is_left_to_energon(tmp_path):
    theirs, ours = readers(pack(tmp_path / "wds", (tarfile.USTAR_FORMAT, [
        ("0.json", b"{}"), (f"0.{PLACES}", b"x"), ("1.json", b"{}"), ("1.__key__", b"x")])))
    assert ours[0] == theirs[0]
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
            for _ in build_train_loader(config, hf_dir=hf_dir, spec=spec):
                pass


def test_a_place_beyond_its_sample_is_not_believed(wds):
    _header(wds, 1024, size=b"00000100000\0")
    _, ours = readers(wds, lambda part: part == "json")
    assert PLACES not in ours[0] and ours[0]["json"] == b'{"a": 0}'
    assert PLACES in ours[1]


def test_a_reader_of_long_names_remembers_no_header_it_has_passed(tmp_path):
    """What is left to energon goes through Python's tarfile, which keeps every header."""
    members = [(f"{LONG}{number}.json", b"{}") for number in range(50)]
    theirs, _ = readers(pack(tmp_path / "wds", (tarfile.PAX_FORMAT, members)))

    class End:
        join_readers = (theirs,)

    readers_ = TarReaders(End, ShardFiles())
    (reader,) = readers_.readers
    assert End.join_readers == [reader] and isinstance(reader, LocalShards)
    for index in range(50):
        assert reader[index]["json"] == b"{}"
    (tar,) = reader.itar_files_cache.values()
    assert len(tar.members) >= 50
    readers_.forget()
    assert not tar.members


@pytest.mark.parametrize("build", [build_train_loader, build_valid_loader])
def test_loaders_read_no_shard_through_tarfile(build, wds_dir, hf_dir, spec, monkeypatch):
    monkeypatch.setattr(tarfile.TarFile, "next", None)
    config = DataConfig(train=Mixture.parse(str(wds_dir)), valid=Mixture.parse(str(wds_dir)),
                        seq_length=512, num_workers=0, packing_buffer_size=64)
    batch = next(iter(build(config, hf_dir=hf_dir, spec=spec)))
    assert batch.num_samples == batch.num_images > 3


def test_a_loader_has_its_readers_forget_the_headers_they_have_passed(
    wds_dir, hf_dir, spec, tmp_path
):
    shards = []
    for path in sorted(wds_dir.glob("*.tar")):
        with tarfile.open(path) as tar:
            shards.append((tarfile.PAX_FORMAT, [
                (LONG + one.name, tar.extractfile(one).read()) for one in tar]))
    wds = pack(tmp_path / "wds", *shards)
    config = DataConfig(train=Mixture.parse(str(wds)), seq_length=512, num_workers=0,
                        packing_buffer_size=64)
    loader = build_train_loader(config, hf_dir=hf_dir, spec=spec)
    batches = iter(loader)
    assert sum(next(batches).num_samples for _ in range(40)) > 300
    (reader,) = TarReaders(loader._loader.dataset, ShardFiles()).readers
    assert reader.itar_files_cache
    kept = sum(len(tar.members) for tar in reader.itar_files_cache.values())
    assert kept < 150  # headers of the samples read ahead for the packing buffer


def test_slices_are_drawn_as_energon_draws_them():
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0, seed_offset=7)
    workers.worker_activate(0)
    try:
        theirs, ours = WorkerRng(workers), SliceRng(workers)
        sizes = random.Random(0)
        for _ in range(300):
            # New sizes in the old tensor's memory, as an epoch's end may leave them.
            probs = torch.tensor([float(sizes.choice((0, 1, 3, 100, 99_999))) for _ in range(16)])
            probs[sizes.randrange(16)] = 1
            for _ in range(8):
                assert ours.choice_idx(probs) == theirs.choice_idx(probs)
                probs[sizes.randrange(16)] += sizes.choice((0, 5))
        with torch.inference_mode():
            inferred = probs.clone()
            assert ours.choice_idx(inferred) == theirs.choice_idx(inferred)
        assert ours.choice_idx(probs[:1]) == theirs.choice_idx(probs[:1]) == 0
        again = SliceRng(workers)
        again.restore_state(theirs.save_state())
        assert ours.save_state() == theirs.save_state()
        assert again.choice_idx(probs) == theirs.choice_idx(probs)
    finally:
        workers.worker_deactivate()


# ---- single files --------------------------------------------------------------------------------


def test_a_file_is_read_by_its_place_and_by_energons_index(wds):
    _, ours = readers(wds)
    for number in range(3):
        places = ours[number][PLACES]
        for given in (places, None):
            read = ShardFiles(max_open=1).reader(EPath(wds), str(number), given)
            assert read("0.png") == bytes([number]) * 9_000


@pytest.mark.parametrize("by_place", [True, False])
def test_a_file_that_is_not_there_is_named(wds, by_place):
    places = readers(wds)[1][0][PLACES] if by_place else None
    with pytest.raises(BadMedia, match=r"its file 0\.1\.png is not in"):
        ShardFiles().read(EPath(wds), "0", places, "1.png")


@pytest.mark.parametrize("size", [2**62, 2**40])
@pytest.mark.parametrize("by_place", [True, False])
def test_who_asks_for_all_memory_gets_what_is_there(wds, size, by_place):
    shard, places = readers(wds)[1][0][PLACES]
    if by_place:
        places = shard, {"0.png": (places["0.png"][0], size)}
    else:
        places = None
        with sqlite3.connect(wds / ".nv-meta" / "index.sqlite") as index:
            (table,) = (name for name, in index.execute(
                "select name from sqlite_master where type = 'table' and name like '%parts%'"))
            index.execute(f"update {table} set content_byte_size = {size}")
    with pytest.raises(BadMedia, match="the shard .* ends within its file"):
        ShardFiles().read(EPath(wds), "0", places, "0.png")


def test_a_shard_that_is_gone_is_named(wds):
    places = readers(wds)[1][0][PLACES]
    (wds / SHARD).unlink()
    with pytest.raises(BadMedia, match=r"its file 0\.0\.png cannot be read"):
        ShardFiles().read(EPath(wds), "0", places, "0.png")


def test_a_forked_process_opens_files_of_its_own(wds):
    files = ShardFiles()
    read = files.reader(EPath(wds), "0")
    assert read("0.png") == bytes(9_000)
    before = dict(files._indices)
    child = os.fork()
    if child == 0:
        right = read("0.png") == bytes(9_000)
        (name,) = files._indices
        os._exit(0 if right and files._indices[name] is not before[name] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read("0.png") == bytes(9_000) and files._indices == before


def test_files_are_closed_with_who_opened_them_and_no_more_are_open_than_told(wds):
    def opened():
        return sum(os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(wds))
                   for fd in os.listdir("/proc/self/fd"))

    files = ShardFiles(max_open=2)
    for part in (SHARD, f"{SHARD}.idx", ".nv-meta/split.yaml", ".nv-meta/dataset.yaml", SHARD):
        assert files.pread(str(wds / part), 4, 0)
        assert 1 <= opened() <= 2
    files.expect(10**9)
    assert 2 < files.max_open < 10**9
    del files
    assert opened() == 0
