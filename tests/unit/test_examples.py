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
from test_docs import LINK, blocks, commands, headings, options, parser, prose

from megatron_vl.cli.main import COMMANDS
from megatron_vl.cli.mm_convert import make_parser as mm_convert
from megatron_vl.training.options.hf_trainer import FLAGS, translate

SHELLS = sorted(p for p in (ROOT / "examples").rglob("*") if p.suffix in (".sh", ".sbatch"))
SBATCH = ROOT / "examples" / "slurm" / "train.sbatch"
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
            own = words[: words.index("--")] if "--" in words else words  # behind it are another's
            flags = {word.split("=")[0] for word in own if word.startswith("--")}
            assert flags <= options(command), f"{name(path)}: {flags - options(command)}"
            seen += command == "train"
    assert seen >= 4, "the launcher, Slurm's script and both manifests train"


@pytest.fixture
def slurm(tmp_path):
    """Run Slurm's script as a job that was `preempted` then or not. srun and scontrol are stood for
    by programs that print their words; the real ones are in tests/hosts."""

    def run_job(*words: str, code: int = 0, preempted: str = "None") -> subprocess.CompletedProcess:
        stand_ins = {
            "srun": f'printf "%s\\n" "$@"; exit {code}',
            "scontrol": f'[ $1 = show ] && echo PreemptTime={preempted} || echo "$@"',
        }
        for name, body in stand_ins.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
               "PYTHON": sys.executable, "SLURM_JOB_ID": "7"}
        return subprocess.run(["bash", SBATCH, *words], env=env, text=True, capture_output=True)

    return run_job


def test_slurms_script_starts_one_task_a_node_and_passes_words_whole(slurm):
    done = slurm("my run.yaml", "--lr", "1e-3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "--ntasks-per-node=1", "--kill-on-bad-exit=1", sys.executable, "-m", "megatron_vl", "train",
        "--cluster-env", "--config", "my run.yaml", "--lr", "1e-3",
    ]
    assert re.search(r"^#SBATCH --ntasks-per-node=1$", SBATCH.read_text(), re.M)
    assert slurm().returncode == 2


@pytest.mark.parametrize(("code", "preempted", "ends", "queued"), [
    (0, "2026-01-01T00:00:00", 0, True),
    (1, "2026-01-01T00:00:00", 0, True),  # before it could save
    (2, "2026-01-01T00:00:00", 2, False),  # it would be refused again
    (1, "None", 1, False),
])
def test_slurms_script_queues_a_preempted_job_again(slurm, code, preempted, ends, queued):
    done = slurm("run.yaml", code=code, preempted=preempted)
    assert (done.returncode, "requeue 7\n" in done.stdout) == (ends, queued), done.stderr


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


@pytest.mark.parametrize("page", ["examples/ascend/README.md", "examples/ascend/README_zh.md"])
def test_the_commands_of_the_ascend_page_can_be_given_as_they_are_written(page):
    assert blocks(page) == blocks("examples/ascend/README.md")
    assert [level for level, _ in headings(page)] == [1, 2, 2, 2, 2, 2]
    for link in LINK.findall(prose(page)):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for program, *words in commands(page):
        if program == "bash":
            assert (ROOT / words[0]).is_file(), words
        elif program == "mm-convert":
            mm_convert().parse_args(words)
        else:
            assert program in ("megatron-vl", "pip", "modelscope"), words


SHOWN = ("NPROC_PER_NODE", "ASCEND_TOOLKIT_HOME", "TASK_QUEUE_ENABLE", "COMBINED_ENABLE")
MODELARTS = {"MA_NUM_HOSTS": "2", "VC_TASK_INDEX": "1", "MA_NUM_GPUS": "8",
             "VC_WORKER_HOSTS": "job-worker-0.job,job-worker-1.job"}


@pytest.mark.parametrize(("script", "words", "variables", "becomes"), [
    ("train_full_8p.sh", ["--model_name=/m m", "--data_path=d.json", "--epochs=2", "--fix_vit",
                          "False", "--", "--tp", "2"], {"NPUS_PER_NODE": "4"},
     ["megatron_vl finetune", "--model_name_or_path /m m", "--data_path d.json",
      "--num_train_epochs 2", "--per_device_train_batch_size 1", "--gradient_accumulation_steps 16",
      "--fix_vit False -- --tp 2", "NPROC_PER_NODE=4", "TASK_QUEUE_ENABLE=2"]),
    ("train_full_8p.sh", ["--model_name=m", "--data_path=d", "--batch_size=2",
                          "--gradient_accumulation_steps=3", "--output_path=o"],
     MODELARTS | {"TASK_QUEUE_ENABLE": "1"},
     ["--per_device_train_batch_size 2", "--gradient_accumulation_steps 3", "--output_dir o",
      "NPROC_PER_NODE=\n", "TASK_QUEUE_ENABLE=1", "COMBINED_ENABLE=1"]),
    ("finetune_qwen2_5_vl_7b.sh", ["--train-iters", "7"], MODELARTS,
     ["megatron_vl.cli.mm_train", "--nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr "
      "job-worker-0.job --master_port 29500", "--global-batch-size 384", "--train-iters 7"]),
    ("finetune_qwen2_5_vl_7b.sh", [], {"NPUS_PER_NODE": "4"},
     ["--nproc_per_node 4 --nnodes 1 --node_rank 0", "--global-batch-size 96"]),
])
def test_published_ascend_commands_start_ours_with_cann_known(
    script, words, variables, becomes, tmp_path
):
    python, cann = tmp_path / "python", tmp_path / "set_env.sh"
    python.write_text(f'#!/bin/sh\n[ "$3" = cluster-env ] && exec {sys.executable} "$@"\n'
                      f'echo "$@"\n' + "".join(f'echo {one}="${one}"\n' for one in SHOWN))
    python.chmod(0o755)
    cann.write_text('export ASCEND_TOOLKIT_HOME=/cann LD_LIBRARY_PATH="/cann:$LD_LIBRARY_PATH"\n')
    clean = {name: value for name, value in os.environ.items()
             if name not in SHOWN and name != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        ["bash", ROOT / "examples" / "ascend" / script, *words], capture_output=True, text=True,
        env=clean | {"PYTHON": str(python), "ASCEND_SET_ENV": str(cann)} | variables)
    assert done.returncode == 0, done.stderr
    for part in (*becomes, "ASCEND_TOOLKIT_HOME=/cann"):
        assert part in done.stdout, part
    (said,) = done.stderr.splitlines()
    assert "which nothing had set" in said
    assert ("TASK_QUEUE_ENABLE" in said) == ("TASK_QUEUE_ENABLE" not in variables)


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
    suggested = re.findall(r"^  (\S.*)$", done.stdout.partition("\nWhat to try next\n")[2], re.M)
    assert suggested[0] == f". {program.parent}/bin/activate"
    for words in (line.split()[1:] for line in suggested if line.startswith("megatron-vl ")):
        parser(words[0]).parse_args(words[1:])
    assert len(suggested) == 6


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
