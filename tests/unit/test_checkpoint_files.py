"""Which checkpoint a run goes on from, which are let go, and what their checksums find."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

import pytest

from megatron_vl.errors import InputError
from megatron_vl.training.checkpoint.files import (
    LATEST,
    candidates,
    checksum,
    delete_old,
    faults,
    iterations,
    partial_folder,
    publish,
    read_checksums,
    write_checksums,
)


@pytest.fixture
def run(tmp_path):
    for iteration in (10, 20, 30):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
    partial_folder(tmp_path, 40).mkdir()
    (tmp_path / "iter_best").mkdir()  # a user's own copy
    return tmp_path


LATESTS = {  # what the file says -> iterations that may be gone on from, the first of them first
    "30\n": [30, 20, 10], "20": [20, 10], " 10 \n": [10], None: [30, 20, 10],
}


@pytest.mark.parametrize(("says", "expected"), LATESTS.items(), ids=map(str, LATESTS))
def test_a_run_goes_on_from_what_the_file_says_and_else_from_those_before(says, expected, run):
    if says is not None:
        (run / LATEST).write_text(says)
    assert [int(path.name[5:]) for path in candidates(run)] == expected


@pytest.mark.parametrize("says", ["40\n", "15", "newest", ""])
def test_an_iteration_that_is_not_there_is_answered_with_those_that_are(says, run):
    (run / LATEST).write_text(says)
    with pytest.raises(InputError, match="has 10, 20, 30; write one of these into it"):
        candidates(run)


def test_a_converted_checkpoint_is_its_only_one(run):
    (run / LATEST).write_text("release")
    (run / "release").mkdir()
    assert candidates(run) == [run / "release"]


def test_an_empty_directory_holds_no_run(tmp_path):
    assert candidates(tmp_path) == [] and candidates(tmp_path / "none") == []


def test_publishing_replaces_what_has_the_name_and_says_it_is_the_latest(run):
    partial_folder(run, 30).mkdir()
    (partial_folder(run, 30) / "new").touch()
    (run / "iter_0000030" / "old").touch()
    assert publish(run, 30) == run / "iter_0000030"
    assert [one.name for one in (run / "iter_0000030").iterdir()] == ["new"]
    assert (run / LATEST).read_text() == "30\n"
    assert sorted(one.name for one in run.iterdir()) == [
        ".iter_0000040.partial", "iter_0000010", "iter_0000020", "iter_0000030", "iter_best", LATEST
    ]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(12))
def test_wherever_publishing_is_cut_short_a_run_goes_on_from_a_whole_checkpoint(
    moment, run, monkeypatch
):
    """Iteration 30 is damaged and written anew; every call that changes a disk is the last once."""
    (run / LATEST).write_text("30\n")
    partial_folder(run, 30).mkdir()
    (partial_folder(run, 30) / "new").touch()
    (run / "iter_0000030" / "damaged").touch()
    calls = 0

    def last_at(call):
        def made(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            return call(*arguments, **options)
        return made

    for module, name in ((os, "replace"), (os, "fsync"), (os, "rename"), (os, "unlink"),
                         (shutil, "rmtree"), (type(run), "rename"), (type(run), "unlink")):
        monkeypatch.setattr(module, name, last_at(getattr(module, name)))
    with contextlib.suppress(Killed):
        publish(run, 30)
    monkeypatch.undo()
    first = candidates(run)[0]
    assert first.is_dir()
    assert (first / "new").exists() or int(first.name[5:]) < 30 or (first / "damaged").exists()
    if calls <= moment:
        assert (first / "new").exists() and moment > 5


def test_only_the_oldest_up_to_the_newest_are_deleted(run):
    # Set back to 20 by hand: what lies ahead is neither kept nor counted.
    assert delete_old(run, 20, 1) == [10]
    assert iterations(run) == [20, 30]
    assert delete_old(run, 30, 5) == []
    assert delete_old(run, 30, 1, held={"iter_0000020"}) == []


def test_checksums_are_those_of_sha256sum_and_find_every_kind_of_damage(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text(name * 1000)
    write_checksums(tmp_path, {name: checksum(tmp_path / name) for name in "abcd"})
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    sums = read_checksums(tmp_path)
    assert faults(tmp_path, sums, sorted(sums)) == []
    (tmp_path / "a").write_text("a" * 999)
    (tmp_path / "b").unlink()
    (tmp_path / "c").unlink()
    (tmp_path / "c").mkdir()
    found = faults(tmp_path, sums, sorted(sums))
    assert found == ["a is not what was written", "b is missing",
                     "c cannot be read (Is a directory)"]
    assert faults(tmp_path, sums, ["d"]) == []


@pytest.mark.parametrize("line", ["", "?", f"{'0' * 64}  ../../etc/passwd", f"{'0' * 63}  a"])
def test_a_damaged_list_of_checksums_is_no_list(line, tmp_path):
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  a\n{line}\n")
    with pytest.raises(ValueError, match="SHA256SUMS is damaged"):
        read_checksums(tmp_path)


def test_a_checkpoint_of_another_tool_has_no_checksums(tmp_path):
    assert read_checksums(tmp_path) is None
