"""Models by their names on a hub: found in real caches, and downloaded from a small hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from commands import environment_with
from huggingface_hub import constants

from megatron_vl.cli.main import run
from megatron_vl.errors import InputError
from megatron_vl.weights.hub import local_model

NAME, COMMIT = "Qwen/Tiny-VL-0.5B", "4f" * 20


def hugging_face(model: Path, cache: Path) -> Path:
    """The model in `cache` as huggingface_hub keeps it: files named by content, and links."""
    root = cache / "models--Qwen--Tiny-VL-0.5B"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, root / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def modelscope(where: str):
    return lambda model, cache: Path(shutil.copytree(model, cache / where))


CACHES = {
    "Hugging Face's": hugging_face,
    "ModelScope's": modelscope("models/Qwen--Tiny-VL-0.5B/snapshots/master"),
    "ModelScope's of old": modelscope("models/Qwen/Tiny-VL-0___5B"),
    "ModelScope's of old, at home": modelscope("hub/models/Qwen/Tiny-VL-0___5B"),
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty one, of either hub; the network is not there."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    local_model.cache_clear()
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", CACHES)
def test_a_name_is_found_in_the_cache_of_a_hub(kind, cache, hf_dir, capsys):
    made = CACHES[kind](hf_dir, cache)
    found = local_model(NAME)
    assert found.samefile(made) and (found / "model.safetensors").is_file()
    assert capsys.readouterr().out == f"{NAME} is {found}\n"
    branch = {"Hugging Face's": "main", "ModelScope's": "master"}.get(kind)
    if branch is not None:
        assert local_model(f"{NAME}@{branch}").samefile(made)
    with pytest.raises(InputError, match=f"^{NAME}@other is no directory here"):
        local_model(f"{NAME}@other")


def test_a_model_is_scored_by_its_name(cache, hf_dir, capsys):
    hugging_face(hf_dir, cache)
    said = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    Path("data.json").write_text(json.dumps([{"conversations": said}]))
    assert run(["evaluate", NAME, "data.json", "--max-new-tokens", "1", "--quiet"]) == 0
    assert "1 questions answered" in capsys.readouterr().out


def test_a_directory_of_that_name_comes_first(cache, hf_dir):
    hugging_face(hf_dir, cache)
    Path(NAME).mkdir(parents=True)
    assert local_model(NAME) == Path(NAME)


@pytest.mark.parametrize("path", ["runs/tiny", "/nowhere/else", "../here", "gone"])
def test_a_path_with_a_slip_in_it_is_no_name(path, cache):
    Path("runs").mkdir()
    assert local_model(path) == Path(path)


LACKS = {  # files that the cache does not hold -> what is said
    "weights": (["model.safetensors"], "holds no weights"),
    "config": (["config.json"], "has no config.json"),
}


@pytest.mark.parametrize("name", LACKS)
def test_a_model_that_is_not_whole_in_the_cache_is_told(name, cache, hf_dir):
    files, says = LACKS[name]
    snapshot = hugging_face(hf_dir, cache)
    for file in files:
        os.unlink(snapshot / file)
    with pytest.raises(InputError) as told:
        local_model(NAME)
    said = str(told.value)
    assert said.startswith(f"{NAME} is not whole in the cache: {snapshot} {says}"), said
    assert said.endswith("HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or give the "
                         "model's directory."), said
    if name == "weights":
        assert local_model(NAME, weights=False) == snapshot


class Hub(BaseHTTPRequestHandler):
    """A hub that has one model, with files that training has no use for beside it."""

    files: ClassVar[dict[str, bytes]] = {}
    sent: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        where, _, name = self.path.partition(f"/{NAME}/resolve/{COMMIT}/")
        asked = self.path.partition("?")[0]
        if asked == f"/api/models/{NAME}/revision/main":
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode())
        elif asked == f"/api/models/{NAME}/tree/{COMMIT}":
            self.answer(json.dumps([
                {"type": "file", "path": name, "size": len(content), "oid": f"{hash(name):x}"}
                for name, content in self.files.items()
            ]).encode())
        elif not where and name in self.files:
            self.answer(self.files[name], ETag=f'"{hash(name):x}"', X_Repo_Commit=COMMIT)
            if self.command == "GET":
                self.sent.append(name)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in ({"Content_Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(hf_dir, monkeypatch) -> str:
    """Its address."""
    files = {one.name: one.read_bytes() for one in hf_dir.iterdir()}
    monkeypatch.setattr(Hub, "files", files | {"pytorch_model.bin": b"?", "onnx/model.onnx": b"?"})
    monkeypatch.setattr(Hub, "sent", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_model_is_downloaded_once_and_without_what_is_of_no_use(hub, hf_dir, tmp_path):
    """By several processes at once; then the hub may be gone."""
    program = ("import sys; from megatron_vl.weights.hub import local_model;"
               "print(local_model(sys.argv[1], weights=sys.argv[2] == 'True'))")
    environment = environment_with(HF_ENDPOINT=hub, HF_HOME=tmp_path, HF_HUB_OFFLINE=0)

    def start(name: str, *, weights: bool = True, **variables: object) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", program, name, str(weights)], cwd=tmp_path, text=True,
            env=environment | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )

    jobs = [start(NAME), start(NAME, weights=False), start(NAME), start("Qwen/None")]
    said = ["".join(job.communicate()) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0, 1], said
    assert sorted(Hub.sent) == sorted(one.name for one in hf_dir.iterdir())
    assert f"{NAME} is {tmp_path}/hub/models--Qwen--Tiny-VL-0.5B/snapshots/{COMMIT}" in said[0]
    assert "it cannot be downloaded (Hugging Face: Client error '404" in said[3], said[3]
    assert start(NAME, HF_ENDPOINT="http://127.0.0.1:9").wait() == 0
