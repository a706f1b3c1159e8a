"""The README's commands, from an empty folder, one after another as a reader types them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

from commands import ROOT, environment_with, executed_by
from test_docs import blocks, text

ELSEWHERE = ("bash examples/quickstart.sh", "bash tests/run.sh", "pip install")


def lines() -> list[str]:
    """Command lines by hand; what is continued on the next is one."""
    return [line for block in blocks("README.md", "bash")
            for line in block.replace("\\\n", " ").splitlines()
            if line.strip() and not line.startswith(ELSEWHERE)]


def test_every_command_runs_in_the_readmes_order(tmp_path):
    for folder in ("toolkits", "examples"):  # the project's root, with nothing that was made there
        (tmp_path / folder).symlink_to(ROOT / folder)
    (name,) = re.findall(r"Saved as `(runs/\S+\.yaml)`", text("README.md"))
    done = []
    for line in lines():
        words, variables = shlex.split(line), environment_with()
        while match := re.fullmatch(r"([A-Z][A-Z0-9_]*)=(.*)", words[0]):
            variables[match[1]] = match[2]
            del words[0]
        if words[0] == "bash":
            script = ["bash", str(ROOT / words[1]), *words[2:]]
            said, words, variables = executed_by(script, variables)
            assert words is not None, said.text
        elif words[0] == "python":
            words[:1] = [sys.executable]
        else:
            assert words[0] == "megatron-vl", line
            words[:1] = [sys.executable, "-m", "megatron_vl"]
        if name in words:
            (tmp_path / name).write_text(blocks("README.md", "yaml")[0])
        one = subprocess.run(
            words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600
        )
        assert one.returncode == 0, f"{line}\n{one.stdout}\n{one.stderr}"
        done.append(line)
    assert len(done) > 8
