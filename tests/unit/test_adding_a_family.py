"""docs/adding_a_family.md, followed: its files in a package that has no such family."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, environment_with
from test_docs import blocks

PAGE = "docs/adding_a_family.md"
FOLDER = "megatron_vl/models/qwen2"
REGISTRY = "megatron_vl/models/registry.py"


def files() -> dict[str, str]:
    """What the page says each file holds, by its path."""
    split = (block.split("\n", 1) for block in blocks(PAGE, "python"))
    return {name.removeprefix("# "): body for name, body in split}


def test_the_page_shows_the_files_as_they_are():
    shown = files()
    line = shown.pop(REGISTRY)
    assert line in (ROOT / REGISTRY).read_text()
    assert {name: (ROOT / name).read_text() for name in shown} == shown
    own = {f"{FOLDER}/{path.name}" for path in (ROOT / FOLDER).glob("*.py")}
    assert own - shown.keys() == {f"{FOLDER}/__init__.py"}
    assert sum(len((ROOT / name).read_text().splitlines()) for name in own) < 150


@pytest.mark.cold
def test_whoever_follows_the_page_has_a_family(tmp_path):
    package = tmp_path / "package"
    shutil.copytree(ROOT / "megatron_vl", package / "megatron_vl",
                    ignore=shutil.ignore_patterns("__pycache__"))
    shown, registry = files(), package / REGISTRY
    line = shown.pop(REGISTRY)
    registry.write_text(registry.read_text().replace(line, ""))
    shutil.rmtree(package / FOLDER)
    (tmp_path / "runs").mkdir()

    def run(words: list[str]) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "megatron_vl", *words[1:]]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600,
                              env=environment_with(PYTHONPATH=package))

    first, *commands = map(shlex.split, blocks(PAGE, "bash")[0].splitlines())
    before = run(first)
    assert before.returncode == 2 and "model_type 'qwen2' is not supported" in before.stderr

    (package / FOLDER).mkdir()
    (package / FOLDER / "__init__.py").write_text('"""Qwen2."""\n')
    for name, body in shown.items():
        (package / name).write_text(body)
    text, known = registry.read_text(), "_FAMILIES = {"
    (start,) = re.findall(rf"^{known}.*\n", text, re.M)
    registry.write_text(text.replace(start, start + line))
    assert commands.pop()[-1] == "4"  # as many layouts again: tests/parity goes through them
    for words in (first, *commands):
        done = run(words)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    assert "equal within 1e-05" in done.stdout
