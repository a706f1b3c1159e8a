"""Bad input ends with one sentence and code 2; a rank that dies takes its job down, never hangs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
import yaml
from commands import ROOT, environment_with, executed_by, megatron_vl, shell
from distributed_launch import CONVERTOR, LAUNCHER, words

BAD_ARGUMENTS = {
    "unknown ENV": (dict(ENV="cloud"), "ENV is 'cloud'; use dsw or dlc."),
    "unknown PR": (dict(PR="int4"), "PR is 'int4'; use fp16, bf16, fp8 or fp32."),
    "unknown AC": (dict(AC="some"), "AC is 'some'; use sel, full, offload or false."),
    "unknown offload": (dict(OPTIMIZER_OFFLOAD="yes"), "OPTIMIZER_OFFLOAD is 'yes'"),
    "unknown DO": (dict(DO="1"), "DO is '1'; use true or false."),
    "unknown FL": (dict(FL="on"), "FL is 'on'; use true or false."),
    "unknown SP": (dict(SP="maybe"), "SP is 'maybe'; use true or false."),
    "dlc outside DLC": (dict(ENV="dlc"), "ENV dlc needs a scheduler's variables, in DLC WORLD"),
    "TP that does not divide heads": (dict(TP=3), "TP 3 does not divide"),
    "PP that does not divide layers": (dict(PP=3), "do not divide over PP 3"),
    "a batch that does not divide": (
        dict(BATCH_SIZE=3), "GLOBAL_BATCH_SIZE 4 is not a multiple of BATCH_SIZE 3"),
    "PAD_LEN over SEQ_LEN": (dict(PAD_LEN=512), "PAD_LEN 512 must be between 1 and"),
    "rows that TP does not divide": (
        dict(TP=2, SP="true", PAD_LEN=255), "rows of 255 tokens"),
    "another MODEL_SIZE": (dict(MODEL_SIZE="7B"), "MODEL_SIZE is 7B, which has 28 layers"),
    "fp8 without a GPU": (dict(PR="fp8"), "PR fp8 needs TransformerEngine"),
    "AC offload without a GPU": (dict(AC="offload"), "AC offload needs"),
    "a backend without its GPU": (
        dict(MP_EXTRA="--attention-backend flash2"),
        "attention-backend flash2 cannot run here: no CUDA device; use auto, or sdpa"),
    "AC layers that do not divide": (
        dict(AC="full", MP_AC_LAYERS=3), "MP_AC_LAYERS 3 does not divide"),
    "a share of more than all": (dict(OPTIMIZER_OFFLOAD="1.5"), "OPTIMIZER_OFFLOAD is 1.5"),
    "warmup longer than the run": (dict(LR_WARMUP_ITERS=10), "LR_WARMUP_ITERS 10 must be fewer"),
    "no checkpoint there": (
        dict(PRETRAIN_CHECKPOINT_PATH="/nowhere"), "/nowhere does not exist; give a converted"),
    "a word for a number": (dict(LR="fast"), "argument LR: invalid float value: 'fast'"),
    "a node's number": (
        dict(MP_EXTRA="--nnodes 2 --node-rank 2"), "node-rank 2 is not one of the 2 node(s)"),
    "an output below a file": (
        dict(OUTPUT_BASEPATH="README.md/out"), "README.md is a file; give another"),
    "CP that does not divide heads": (
        dict(TP=2, CP=4), "CP 4 does not divide the 2 attention heads that TP 2 leaves"),
    "rows that CP does not divide": (
        dict(CP=2, PAD_LEN=255), "rows of 255 tokens"),
}


@pytest.mark.parametrize(("changes", "sentence"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_before_anything_starts(changes, sentence, workshop, tmp_path):
    given = {
        "DATASET_PATH": workshop.wds_dir, "VALID_DATASET_PATH": workshop.wds_dir,
        "OUTPUT_BASEPATH": tmp_path / "out", "PRETRAIN_CHECKPOINT_PATH": workshop.weights(1, 1),
    }
    environment = {name: value for name, value in changes.items() if name.startswith("MP_")}
    changes = {name: value for name, value in changes.items() if name not in environment}
    done = shell(LAUNCHER, *words(**{**given, **changes}), **environment)
    assert done.code == 2, done.text
    assert sentence in done.err
    assert "Traceback" not in done.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [LAUNCHER, CONVERTOR, "toolkits/hf2mcore_convertor.sh"])
def test_too_few_arguments_print_the_usage_table(script):
    done = shell(script, "dsw", "2B")
    assert done.code == 2
    assert "usage:" in done.err and "MODEL_SIZE" in done.err and "TP" in done.err


def test_a_pp0_split_that_does_not_fit_names_those_that_do(workshop, tmp_path):
    done = workshop.train("bad-split", PP=2, first=4, OUTPUT_BASEPATH=tmp_path,
                          PRETRAIN_CHECKPOINT_PATH=workshop.model_dir)
    assert done.code == 2 and "leaves no language layer for the other" in done.err, done.text


OTHER_LAYOUTS = {
    "another split": (dict(PP=2, first=2), (1, 2, 1), ("llm 1-3", "llm 2-2")),
    "another TP": (dict(TP=2), (1, 1), ("TP 1 PP 1", "TP 2 PP 1")),
}


@pytest.mark.parametrize(("run", "made_for", "names"), OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
def test_a_checkpoint_of_another_layout_is_refused_with_the_mend(run, made_for, names, workshop):
    weights = workshop.weights(*made_for)
    done = workshop.train("other", PRETRAIN_CHECKPOINT_PATH=weights, **run)
    assert done.code == 2, done.text
    assert all(name in done.err for name in names) and "megatron-vl convert" in done.err


def test_an_unknown_configuration_key_names_the_nearest(tmp_path):
    (tmp_path / "run.yaml").write_text("train_itres: 5\n")
    done = megatron_vl("train", "--config", tmp_path / "run.yaml")
    assert done.code == 2 and "did you mean train_iters" in done.err


def copy_of(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def remove_tokenizer(workshop, tmp_path):
    weights = copy_of(workshop.weights(1, 1), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (weights / name).unlink()
    return dict(PRETRAIN_CHECKPOINT_PATH=weights)


def remove_dataset(workshop, tmp_path):
    return dict(DATASET_PATH=tmp_path / "no-data")


def remove_index(workshop, tmp_path):
    data = copy_of(workshop.wds_dir, tmp_path)
    (data / ".nv-meta" / ".info.json").unlink(missing_ok=True)
    (data / ".nv-meta" / ".info.yaml").unlink(missing_ok=True)
    return dict(DATASET_PATH=data)


def remove_shard(workshop, tmp_path):
    data = copy_of(workshop.wds_dir, tmp_path)
    next(iter(sorted(data.glob("shard-*.tar")))).unlink()
    return dict(DATASET_PATH=data)


def empty_validation(workshop, tmp_path):
    data = copy_of(workshop.wds_dir, tmp_path)
    file = data / ".nv-meta" / "split.yaml"
    parts = yaml.safe_load(file.read_text())
    parts["split_parts"]["val"] = []
    file.write_text(yaml.safe_dump(parts))
    return dict(VALID_DATASET_PATH=data)


def remove_weight(workshop, tmp_path):
    weights = shutil.copytree(workshop.weights(1, 2), tmp_path / "weights")
    file = weights / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    del content["model"]["language_model.decoder.final_layernorm.weight"]
    torch.save(content, file)
    return dict(PRETRAIN_CHECKPOINT_PATH=weights)


def damage_images(workshop, tmp_path):
    data = copy_of(workshop.wds_dir, tmp_path)
    for shard in data.glob("shard-*.tar"):
        content = shard.read_bytes()
        # The pixels' compressed stream, not the header that tells the size.
        shard.write_bytes(content.replace(b"IDAT", b"IDXT"))
    return dict(DATASET_PATH=data)


def shorten_rows(workshop, tmp_path):
    return dict(SEQ_LEN=24, PAD_LEN=24)


BAD_FILES = {
    "a missing dataset": (remove_dataset, "no-data"),
    "a missing index": (remove_index, ".nv-meta"),
    "a missing shard": (remove_shard, "shard-"),
    "an empty validation split": (empty_validation, "'val'"),
    "a missing weight": (remove_weight, "language_model.decoder.final_layernorm.weight"),
    "a missing tokenizer": (remove_tokenizer, "tokenizer"),
    "corrupt images": (damage_images, "its image or video is unusable"),
    "samples longer than SEQ_LEN": (shorten_rows, "tokens but a row holds 24"),
}


@pytest.mark.parametrize(("break_it", "names"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_broken_file_is_named_by_one_sentence(break_it, names, workshop, tmp_path):
    changes = break_it(workshop, tmp_path)
    done = workshop.train("broken", PP=2, **{
        "PRETRAIN_CHECKPOINT_PATH": workshop.weights(1, 2), "OUTPUT_BASEPATH": tmp_path / "out",
        **_for_two_stages(changes, workshop, tmp_path),
    })
    assert done.code == 2, done.text
    sentences = [line for line in done.err.splitlines() if line.startswith("megatron-vl train:")]
    assert len(sentences) == 1 and names in sentences[0], done.text
    assert "Traceback" not in done.text


def _for_two_stages(changes, workshop, tmp_path):
    """A broken copy of one-stage weights becomes one of two-stage weights."""
    if changes.get("PRETRAIN_CHECKPOINT_PATH") != tmp_path / "copy":
        return changes
    two = shutil.copytree(workshop.weights(1, 2), tmp_path / "two")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (two / name).unlink()
    return {"PRETRAIN_CHECKPOINT_PATH": two}


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.cold), 1])
def test_a_killed_rank_takes_the_job_down_with_a_message(victim, workshop, tmp_path):
    script = ["bash", str(ROOT / LAUNCHER), *map(str, words(
        PP=2, TRAIN_ITERS=100000, SAVE_INTERVAL=100000, DATASET_PATH=workshop.wds_dir,
        VALID_DATASET_PATH=workshop.wds_dir, OUTPUT_BASEPATH=tmp_path,
        PRETRAIN_CHECKPOINT_PATH=workshop.weights(1, 2),
    ))]
    _, command, env = executed_by(script, environment_with(MP_EXTRA="--max-restarts 0"))
    job = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in job.stdout:
            if line.startswith("iteration"):
                break
        pids = ranks_of(job.pid)
        os.kill(pids[victim], signal.SIGKILL)
        started = time.monotonic()
        _, errors = job.communicate(timeout=180)
    finally:
        job.kill()
    assert job.returncode == 1
    assert time.monotonic() - started < 180
    assert f"rank {victim} was ended by SIGKILL" in errors or f"rank {1 - victim} failed" in errors
    assert all(not os.path.exists(f"/proc/{pid}") for pid in pids.values())


def ranks_of(launcher: int) -> dict[int, int]:
    """rank -> process id of the launcher's children."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{entry}/environ") as file:
                environ = dict(v.split("=", 1) for v in file.read().split("\0") if "=" in v)
        except (OSError, ValueError):
            continue
        if parent == launcher and "LOCAL_RANK" in environ:
            found[int(environ["RANK"])] = int(entry)
    return found
