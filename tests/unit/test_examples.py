"""The files of examples/ fit to what they start: shells parse, manifests load, options exist."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import ROOT, run
from test_docs import options, parser

from megatron_vl.cli.main import COMMANDS
from megatron_vl.training.options.hf_trainer import FLAGS, translate

SHELLS = sorted(p for p in (ROOT / "examples").rglob("*") if p.suffix in (".sh", ".sbatch"))
MANIFESTS = sorted((ROOT / "examples" / "kubernetes").glob("*.yaml"))
EVERY = sorted(p for p in (ROOT / "examples").rglob("*") if p.is_file())


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SHELLS, ids=name)
def test_a_shell_script_parses(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def calls(path: Path) -> list[tuple[str, list[str]]]:
    """(command, words behind it) of every call of the program in a file."""
    text = path.read_text()
    if path.suffix == ".yaml":
        found = []
        for part in _lists(yaml.safe_load(text)):
            if part[:1] == ["megatron-vl"]:
                found.append((part[1], part[2:]))
        return found
    text = text.replace("\\\n", " ")
    # A launcher's call is an array: all the script's flags are one command's.
    if re.search(r"-m megatron_vl train \"\$\{NODES", text):
        start = text.index("\nMP_AC_LAYERS")
        return [("train", re.findall(r"(?<![\w-])--[a-z][\w-]*", text[start:]))]
    return [(command, rest.split()) for command, rest in
            re.findall(r"(?:-m megatron_vl|megatron-vl) ([a-z][a-z-]*)\b(.*)", text)]


def _lists(node) -> list[list]:
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    own = [node] if isinstance(node, list) and all(isinstance(one, str) for one in node) else []
    return own + [found for one in inner for found in _lists(one)]


def test_every_option_that_an_example_gives_is_known():
    seen = 0
    for path in EVERY:
        for command, words in calls(path):
            assert command in COMMANDS, f"{name(path)}: {command}"
            flags = {word.split("=")[0] for word in words if word.startswith("--")}
            assert flags <= options(command), f"{name(path)}: {flags - options(command)}"
            seen += command == "train"
    assert seen >= 4, "the launcher, Slurm's script and both manifests train"


def test_the_manifests_hold_what_their_operators_read():
    pytorch, train = (yaml.safe_load(path.read_text()) for path in MANIFESTS)
    assert (pytorch["apiVersion"], pytorch["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = pytorch["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master", "Worker"] and "elasticPolicy" not in pytorch["spec"]
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(
            pytorch["spec"]["nprocPerNode"])
        volumes = {volume["name"] for volume in replica["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert train["apiVersion"] == "trainer.kubeflow.org/v1alpha1" and train["kind"] == "TrainJob"
    spec = train["spec"]
    assert set(spec) == {"runtimeRef", "trainer"}
    assert set(spec["trainer"]) <= {
        "image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode"}
    limit = spec["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert spec["trainer"]["numProcPerNode"] == limit


def test_slurms_script_starts_one_task_a_node_and_passes_words_whole(tmp_path):
    """srun is stood for by a program that prints its words; sbatch is bash here."""
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    script = ROOT / "examples" / "slurm" / "train.sbatch"
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
           "PYTHON": sys.executable}
    done = subprocess.run(["bash", script, "my run.yaml", "--lr", "1e-3"], env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "--ntasks-per-node=1", "--kill-on-bad-exit=1", sys.executable, "-m", "megatron_vl", "train",
        "--cluster-env", "--config", "my run.yaml", "--lr", "1e-3",
    ]
    assert re.search(r"^#SBATCH --ntasks-per-node=1$", script.read_text(), re.M)
    assert subprocess.run(["bash", script], capture_output=True).returncode == 2


def test_dlcs_command_gives_the_launcher_all_its_arguments():
    """bash is stood for by a function that counts."""
    script = (ROOT / "examples" / "dlc" / "train.sh").read_text()
    count = 'bash() { shift; echo "$# $1"; }\n' + script.replace("exec bash", "bash")
    done = subprocess.run(["bash", "-c", count], env={**os.environ, "CODE": str(ROOT)}, text=True,
                          capture_output=True)
    assert done.stdout == "23 dlc\n", done.stderr


# ---- the quickstart -----------------------------------------------------------------------------

# Stands for Python and for the program: notes its words, and makes the folders it would write.
NOTE = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" $'\\n' >> "$NOTES"
while [ $# -gt 1 ]; do
  case $1 in
    --save) mkdir -p "$2" ;;
    --metrics-file) mkdir -p "$(dirname "$2")" ;;
  esac
  shift
done
"""


@pytest.mark.parametrize("family", [
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen_vl", "baichuan2"])
def test_every_command_of_a_familys_quickstart_is_taken_by_its_parser(family, tmp_path):
    program, notes = tmp_path / "venv" / "bin", tmp_path / "notes"
    program.mkdir(parents=True)
    for name in ("python", "megatron-vl"):
        (program / name).write_text(NOTE)
        (program / name).chmod(0o755)
    setup = f".[test]{ROOT}{(ROOT / 'setup.py').read_text().rstrip()}"
    digest = hashlib.sha256(setup.encode()).hexdigest()[:16]
    (program.parent / f".installed-{digest}").touch()
    done = subprocess.run(
        ["bash", ROOT / "examples" / "quickstart.sh", "--family", family], text=True,
        capture_output=True, env={**os.environ, "VENV": str(program.parent), "NOTES": str(notes),
                                  "WORK": str(tmp_path / "work")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    called = []
    for line in notes.read_text().split("\n\0")[:-1]:
        words = line.split("\0")[:-1]
        if words[:3] == ["python", "-m", "megatron_vl"]:
            words[:3] = ["megatron-vl"]
        if words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
            continue
        args = parser(words[1]).parse_args(words[2:])
        called.append(words[1])
        if words[1] == "finetune":
            translate({flag: getattr(args, flag) for flag in FLAGS})
            parser("train").parse_args(args.options)
    trained = "train" if family.startswith(("qwen2", "qwen3")) else "finetune"
    assert called == ["tiny", "convert", trained, trained, "convert", "plot", "plot",
                      "evaluate"]


def test_a_family_without_a_quickstart_is_refused():
    script = ROOT / "examples" / "quickstart.sh"
    done = subprocess.run(["bash", script, "--family", "qwen2"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("quickstart.sh: give --family qwen2_vl, qwen2_5_vl, qwen3_vl, "
                           "qwen3_vl_moe, qwen_vl or baichuan2, not '--family qwen2'.\n")


def test_easy_vqa_in_words_says_what_its_questions_are_about(tmp_path):
    script = "toolkits/pretrain_data_preprocessing/easy_vqa_to_llava.py"
    assert run([sys.executable, ROOT / script, tmp_path, "--text", "--max-images", 9]).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "test.json", "train-shape.json", "train.json"]
    for split in ("train", "test"):
        entries = json.loads((tmp_path / f"{split}.json").read_text())
        assert len(entries) > 20
        groups = {"groups"} if split == "test" else set()
        assert all(entry.keys() == {"id", "conversations"} | groups for entry in entries)
        for asked, answer in (entry["conversations"] for entry in entries):
            said, question = asked["value"].split("\n")
            assert re.fullmatch(r"The image shows one \w+ \w+\.", said) and question.endswith("?")
            assert answer["value"] in ("yes", "no", *said.strip(".").split()[-2:])
