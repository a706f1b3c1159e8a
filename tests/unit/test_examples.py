"""The files of examples/ fit to what they start: shells parse, manifests load, options exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import ROOT
from test_docs import options

from megatron_vl.cli.main import COMMANDS

SHELLS = sorted(p for p in (ROOT / "examples").rglob("*") if p.suffix in (".sh", ".sbatch"))
MANIFESTS = sorted((ROOT / "examples").rglob("*.yaml"))
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
