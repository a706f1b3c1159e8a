"""The positional scripts: usage tables, refused words, and the same files as the command."""

import os
import subprocess
import sys

import pytest
from tiny_hf import ROOT, assert_equal, make, read, read_mcore

FAMILY = ROOT / "toolkits" / "hf2mcore_convertor.sh"
TRAINER = ROOT / "examples" / "qwen2_vl" / "run_mcore_qwen.sh"
QWEN2_VL = (ROOT / "toolkits" / "model_checkpoints_convertor" / "qwen"
            / "hf2mcore_qwen2_vl_convertor.sh")


@pytest.fixture(scope="session")
def hf(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hf") / "tiny", "--dtype", "float32")


def shell(script, *arguments, cwd=ROOT, **variables):
    env = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(["bash", str(script), *map(str, arguments)], env=env, cwd=cwd,
                          capture_output=True, text=True, timeout=120)


def test_there_and_back_with_an_uneven_first_stage_from_any_directory(hf, tmp_path):
    done = shell(QWEN2_VL, "auto", hf, "m", 2, 2, "false", "fp32", cwd=tmp_path, MP_PP0_LAYERS="1")
    assert done.returncode == 0, done.stderr
    ranks = read_mcore(tmp_path / "m")
    assert list(ranks) == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    assert ranks["mp_rank_00_000"]["args"].decoder_first_pipeline_num_layers == 1
    done = shell(FAMILY, "auto", "m", "back", 2, 2, "true", "fp32", hf, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal(read(tmp_path / "back"), read(hf))
    done = shell(FAMILY, "auto", "m", "back", 2, 2, "true", "fp32", hf, cwd=tmp_path)
    assert done.returncode == 2 and "MP_OVERWRITE=true" in done.stderr


def test_the_direction_must_fit_the_source(hf, tmp_path):
    done = shell(QWEN2_VL, "auto", hf, tmp_path / "m", 1, 1, "true", "fp32", hf)
    assert done.returncode == 2 and done.stderr.endswith(
        f"{hf} is a Hugging Face directory but mg2hf true asks for a Megatron-Core checkpoint; "
        f"give another SRC, or mg2hf false.\n"), done.stderr
    done = shell(FAMILY, "auto", hf, tmp_path / "m", 1, 1, "false", "float32")
    assert done.returncode == 0, done.stderr
    done = shell(FAMILY, "auto", tmp_path / "m", tmp_path / "n", 1, 1, "false", "fp32")
    assert done.returncode == 2 and done.stderr.endswith(
        f"{tmp_path / 'm'} is a Megatron-Core checkpoint but mg2hf false asks for a Hugging Face "
        f"directory; give another SRC, or mg2hf true.\n"), done.stderr
    assert not (tmp_path / "n").exists()


def test_overwriting_has_to_be_asked_for_by_name(hf, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "old").write_text("x")
    (tmp_path / "m" / "config.json").write_text("{}")
    done = shell(FAMILY, "auto", hf, tmp_path / "m", 1, 1, "false", "bf16", MP_OVERWRITE="true")
    assert done.returncode == 0, done.stderr
    assert sorted(read_mcore(tmp_path / "m")) == ["mp_rank_00"]
    assert not (tmp_path / "m" / "old").exists()


@pytest.mark.parametrize("arguments, variables, says", [
    (["auto", "S", "T", "2", "2", "yes", "bf16"], {}, "mg2hf is 'yes'; use true or false"),
    (["auto", "S", "T", "2", "2", "false", "fp8"], {}, "PR is 'fp8'; use fp16, bf16 or fp32"),
    (["auto", "S", "T", "two", "2", "false", "bf16"], {}, "TP is 'two'"),
    (["auto", "S", "T", "2", "2", "true", "bf16"], {}, "HF_CKPT_PATH, is required"),
    (["auto", "S", "T", "2", "2", "false", "bf16"], {"MP_PP0_LAYERS": "x"}, "MP_PP0_LAYERS is 'x'"),
    (["auto", "S", "T", "2", "2", "false", "bf16"], {"MP_OVERWRITE": "1"}, "use true or false"),
    (["auto", "S", "T", "2", "2", "false", "bf16", "H", "more"], {}, "too many"),
])
def test_unknown_words_are_refused_before_anything_runs(arguments, variables, says, tmp_path):
    done = shell(FAMILY, *arguments, cwd=tmp_path, **variables)
    assert done.returncode == 2 and says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_dry_run_may_name_a_target_that_is_there(hf, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "old").write_text("x")
    for script in (FAMILY, QWEN2_VL):
        done = shell(script, "auto", hf, tmp_path / "m", 1, 1, "false", "bf16", MP_DRY_RUN="true")
        assert done.returncode == 0 and "embedding" in done.stdout, done.stderr
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["old"]


@pytest.mark.parametrize(("script", "number", "name"), [
    (TRAINER, 18, "DATASET_PATH"), (TRAINER, 19, "VALID_DATASET_PATH"),
    (TRAINER, 20, "PRETRAIN_CHECKPOINT_PATH"), (TRAINER, 23, "OUTPUT_BASEPATH"),
    (FAMILY, 2, "SOURCE"), (FAMILY, 3, "TARGET"),
])
def test_an_empty_path_is_refused_by_its_name(script, number, name):
    words = ["x"] * (23 if script is TRAINER else 7)
    words[number - 1] = ""
    done = shell(script, *words, PYTHON="echo")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script.name}: {name} is empty; give a ")


def test_a_size_that_is_not_config_jsons_is_refused(hf, tmp_path):
    done = shell(QWEN2_VL, "2B", hf, tmp_path / "m", 2, 2, "false", "bf16")
    assert done.returncode == 2 and "MODEL_SIZE is 2B" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extra, words", [
    ("", []),
    ("--eval-iters 10\n  --finetune", ["--eval-iters", "10", "--finetune"]),
    ("--finetune *\n", ["--finetune", "*"]),  # not a pattern of files
])
def test_extra_options_of_every_line_reach_the_trainer(extra, words):
    done = shell(TRAINER, "dsw", *["x"] * 7, "bf16", 1, 1, 1, "true", "true", "sel", "false",
                 *["x"] * 3, "none", *["x"] * 3, PYTHON="echo", MP_EXTRA=extra)
    assert done.returncode == 0, done.stderr
    given = done.stdout.splitlines()[-1].split()  # what `echo` in Python's place was given
    assert given[given.index("selective") + 1 :] == words  # AC's option is the last before them
