"""A directory takes its place at once: whatever ends the run, a whole one is there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vl.errors import InputError
from megatron_vl.outputs import check_target, replacing
from megatron_vl.weights.hf_io import copy_side_files


def check(target: Path, overwrite: bool = True) -> None:
    check_target(target, overwrite=overwrite, needed=[], what="marked directory",
                 is_ours=lambda there: (there / "mark").exists())


def test_what_a_killed_run_left_is_removed_and_its_old_directory_put_back(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    host = socket.gethostname()
    for kind, pid in (("partial", done.pid), ("replaced", done.pid), ("partial", os.getppid())):
        (tmp_path / f".out.{kind}-{host}-{pid}/mark").mkdir(parents=True)
    (tmp_path / f".out.partial-elsewhere-{done.pid}").mkdir()
    check(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {
        "out", f".out.partial-{host}-{os.getppid()}", f".out.partial-elsewhere-{done.pid}",
    }  # fmt: skip


def test_the_old_directory_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "mark").mkdir(parents=True)
    with replacing(out) as partial:
        (partial / "new").touch()
        assert (out / "mark").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["new"]
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: _fail_to_take(self, target, rename))
    with pytest.raises(InputError, match="cannot be written"), replacing(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "new").exists()


def _fail_to_take(path, target, rename):
    if ".partial-" in path.name:
        raise OSError("killed here")
    return rename(path, target)


@pytest.mark.parametrize("moved", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_between_two_directories_leaves_one_of_them(tmp_path, monkeypatch, moved, when):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    rename, calls = Path.rename, []

    def interrupted(path, to):
        calls.append(path)
        if len(calls) == moved and when == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        rename(path, to)
        if len(calls) == moved and when == "after":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)), replacing(target) as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    new = (moved, when) == (2, "after")
    assert [path.name for path in target.iterdir()] == ["new" if new else "old"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_empty_directory_may_be_written_and_another_one_only_if_it_is_ours(tmp_path, overwrite):
    check(tmp_path / "none", overwrite)
    (tmp_path / "out").mkdir()
    check(tmp_path / "out", overwrite)
    (tmp_path / "out" / "thesis.tex").touch()
    said = "holds no marked directory" if overwrite else "exists and is not empty"
    with pytest.raises(InputError, match=said):
        check(tmp_path / "out", overwrite)


def test_a_models_files_are_replaced_only_where_they_differ_and_at_once(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text(folder.name)
    before = (target / "config.json").stat().st_ino
    names = copy_side_files(source, target)
    assert names == ["config.json", "tokenizer.json"]
    assert (target / "tokenizer.json").read_text() == "source"
    assert (target / "config.json").stat().st_ino == before
    (source / "tokenizer.json").write_text("newer")
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        copy_side_files(source, target)
    assert (target / "tokenizer.json").read_text() == "source", "whole until it is replaced"
