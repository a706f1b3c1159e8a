"""Shell scripts run as they are typed: by any shell, with the published words, by any Python."""

import os
import shutil
import subprocess
import sys

import pytest
from commands import ROOT
from test_convert_shells import FAMILY, QWEN2_VL, TRAINER

SH = shutil.which("dash") or "sh"  # dash is what `sh` is on Debian and Ubuntu
BATCH = ROOT / "examples" / "slurm" / "train.sbatch"
SCRIPTS = [
    path for pattern in ("examples/**/*", "toolkits/**/*", "tests/**/*")
    for path in sorted(ROOT.glob(pattern))
    if path.suffix in (".sh", ".sbatch") and path.read_text().startswith("#!/usr/bin/env bash")
]
# Stands for bash, or for Python: says what it was given.
STUB = "#!/bin/sh\nprintf '%s\\n' \"$@\"\n"


def stub(folder, name):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(STUB)
    (folder / name).chmod(0o755)
    return folder / name


def sh(*words, **variables):
    return subprocess.run(
        [SH, *map(str, words)], env={**os.environ, **variables}, cwd=ROOT, capture_output=True,
        text=True, timeout=60,
    )


def published(**changed):
    """The known recipe, word for word but for the paths."""
    words = dict(
        ENV="dsw", MODEL_SIZE="7B", BATCH_SIZE="1", GLOBAL_BATCH_SIZE="32", LR="1e-5",
        MIN_LR="1e-6", SEQ_LEN="2048", PAD_LEN="2048", PR="bf16", TP="2", PP="2", CP="1", DO="true",
        FL="false", AC="true", OPTIMIZER_OFFLOAD="false", SAVE_INTERVAL="100000",
        DATASET_PATH="wds", VALID_DATASET_PATH="wds", PRETRAIN_CHECKPOINT_PATH="mcore",
        TRAIN_ITERS="20000", LR_WARMUP_ITERS="200", OUTPUT_BASEPATH="out",
    )
    return (words | changed).values()


def given(done):
    """The words that Python was given, whose stand-in has written one a line."""
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    return words[words.index("-m") :]


def test_every_kind_of_script_is_looked_at():
    assert {TRAINER, FAMILY, QWEN2_VL, BATCH, ROOT / "tests/run.sh"} < set(SCRIPTS)
    others = [path for path in ROOT.glob("*/**/*.sh") if path not in SCRIPTS
              and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    # Two are sourced by others, one is sh's own.
    assert sorted(path.name for path in others) == ["env.sh", "environment.sh", "words_of.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_that_sh_was_given_goes_on_in_bash(script, tmp_path):
    stub(tmp_path / "bin", "bash")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = sh(script, "two words", "*", PATH=path, BASH_VERSION="")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [str(script), "two words", "*"]


@pytest.mark.parametrize(("family", "name"), [("qwen2_vl", "qwen2-vl"),
                                              ("qwen2_5_vl", "qwen2.5-vl"),
                                              ("qwen3_vl", "qwen3-vl")])
def test_the_published_recipe_runs_as_it_is_typed(family, name, tmp_path):
    python, launcher = stub(tmp_path, "python"), TRAINER.parents[1] / family / TRAINER.name
    words = given(sh(launcher, *published(), PYTHON=python))
    assert words[words.index("--save") + 1].startswith(f"out/checkpoint/mcore-{name}-7B-lr-1e-5-")
    assert words[:4] == ["-m", "megatron_vl", "train", "--no-cluster-env"]
    for option, value in {
        "--model-size": "7B", "--global-batch-size": "32", "--max-padding-length": "2048",
        "--attention-backend": "auto", "--recompute-granularity": "selective", "--load": "mcore",
        "--packing-buffer-size": "0", "--log-interval": "1",
    }.items():
        assert words[words.index(option) + 1] == value
    assert {"--bf16", "--use-distributed-optimizer"} < set(words)
    uneven = given(sh(launcher, *published(), PYTHON=python, MP_PP0_LAYERS="12"))
    assert uneven[:-2] == words and uneven[-2:] == ["--decoder-first-pipeline-num-layers", "12"]


CHOSEN = {  # what is typed -> the option it becomes, what is said about it
    "DO true": (dict(DO="true"), ("--use-distributed-optimizer",), ""),
    "DO false": (dict(DO="false"), ("--no-use-distributed-optimizer",), ""),
    "FL true": (dict(FL="true"), ("--attention-backend", "flash-first"), ""),
    "FL false": (dict(FL="false"), ("--attention-backend", "auto"), ""),
    "AC true": (dict(AC="true"), ("--recompute-granularity", "selective"),
                "run_mcore_qwen.sh: AC is 'true', which names no recompute; it runs as sel\n"),
    "AC sel": (dict(AC="sel"), ("--recompute-granularity", "selective"), ""),
    "AC full": (dict(AC="full"), ("--recompute-granularity", "full"), ""),
}


@pytest.mark.parametrize(("words", "option", "said"), CHOSEN.values(), ids=CHOSEN)
def test_each_word_becomes_its_option(words, option, said, tmp_path):
    done = sh(TRAINER, *published(**{"AC": "false", **words}), PYTHON=stub(tmp_path, "python"))
    became = given(done)
    at = became.index(option[0])
    assert tuple(became[at : at + len(option)]) == option
    assert done.stderr == said


def test_ac_true_and_sel_are_one_run(tmp_path):
    python = stub(tmp_path, "python")
    typed = [given(sh(TRAINER, *published(AC=word), PYTHON=python)) for word in ("true", "sel")]
    assert typed[0] == typed[1], "its directory among them"


@pytest.mark.parametrize(("script", "number", "needed"), [
    (TRAINER, 0, "23, or 24 with SP after CP"), (TRAINER, 22, "23, or 24 with SP after CP"),
    (FAMILY, 6, "7, or 8 with HF_CKPT_PATH"), (QWEN2_VL, 0, "7, or 8 with HF_CKPT_PATH"),
])
def test_too_few_words_are_counted_before_the_table(script, number, needed):
    done = sh(script, *["x"] * number)
    first, second, *table = done.stderr.splitlines()
    assert done.returncode == 2 and second.startswith("usage: ") and len(table) > 10
    assert first.partition(": ")[2] == f"arguments given: {number}; needed: {needed}"


def words_for(script):
    return {TRAINER: published(), BATCH: ["run.yaml"]}.get(
        script, ["auto", "hf", "mcore", "1", "1", "false", "bf16"])


@pytest.mark.parametrize("script", [TRAINER, FAMILY, QWEN2_VL, BATCH], ids=lambda path: path.name)
def test_a_python_that_is_not_there_is_one_sentence(script, tmp_path):
    done = sh(script, *words_for(script), PYTHON=str(tmp_path / "python"))
    (said,) = done.stderr.replace("run_mcore_qwen.sh: AC is 'true', which names no recompute; it "
                                  "runs as sel\n", "").splitlines()
    assert done.returncode == 2
    assert said.endswith(f"there is no {tmp_path / 'python'}; set PYTHON to the Python that has "
                         f"the packages.")


@pytest.fixture
def bare(tmp_path):
    """A Python without any package."""
    python = tmp_path / "bare"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize("script", [TRAINER, FAMILY, QWEN2_VL], ids=lambda path: path.name)
def test_a_python_without_the_packages_is_one_sentence(script, bare):
    done = sh(script, *words_for(script), PYTHON=bare)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said.startswith("megatron-vl ") and " has no package " in said
    assert f"pip install -e {ROOT}" in said


@pytest.mark.parametrize("command", [
    "train", "convert", "verify", "lint", "parity x", "plot", "report", "prepare x y"])
def test_no_command_shows_a_traceback_for_a_missing_package(command, bare):
    done = sh(bare, "-m", "megatron_vl", *command.split(), PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert " has no package " in done.stderr


def test_the_nodes_are_told_by_a_python_without_the_packages(bare):
    done = sh(bare, ROOT / "toolkits/parse_environment.py", "nnodes")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
