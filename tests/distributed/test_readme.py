"""The README's commands, from an empty folder, one after another as a reader types them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

from commands import ROOT, environment_with, executed_by
from test_docs import blocks, text

ELSEWHERE = ("bash examples/quickstart.sh", "bash tests/run.sh", "pip install")
SMALLER = {  # than the configuration file says, for a tiny model on two processes
    "MEGATRON_VL_MODEL_SIZE": "auto", "MEGATRON_VL_SEQ_LENGTH": "512",
    "MEGATRON_VL_GLOBAL_BATCH_SIZE": "4", "MEGATRON_VL_MAX_SAMPLES": "60",
    "MEGATRON_VL_NUM_WORKERS": "1", "MEGATRON_VL_EVAL_ITERS": "1",
}


def lines() -> list[str]:
    """Command lines by hand; what is continued on the next is one."""
    return [line for block in blocks("README.md", "bash")
            for line in block.replace("\\\n", " ").splitlines()
            if line.strip() and not line.startswith(ELSEWHERE)]


def test_every_command_runs_in_the_readmes_order(tmp_path, model_dir, llava_dir):
    for folder in ("toolkits", "examples"):  # the project's root, with nothing that was made there
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "Qwen").mkdir()
    for name, stands_in in (("Qwen/Qwen2-VL-7B-Instruct", model_dir),
                            ("images", llava_dir / "images"),
                            ("data.json", llava_dir / "train.json"),
                            ("cat.jpg", next((llava_dir / "images").rglob("*.png")))):
        (tmp_path / name).symlink_to(stands_in)
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
        if any(word.startswith("examples/configs/") for word in words):
            variables |= SMALLER
        if name in words:
            (tmp_path / name).write_text(blocks("README.md", "yaml")[0])
        one = subprocess.run(
            words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600
        )
        assert one.returncode == 0, f"{line}\n{one.stdout}\n{one.stderr}"
        done.append(line)
    assert len(done) > 8
