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
from commands import ROOT, Done, environment_with, executed_by, recorded, shell
from distributed_launch import CONVERTOR, LAUNCHER, words
from safetensors.torch import load_file, save_file

from megatron_vl.cli.main import main

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
        dict(PRETRAIN_CHECKPOINT_PATH="/nowhere"), "/nowhere does not exist; give the directory"),
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


class Here:
    """The commands of `commands`, the scripts by their bash, the rest in this process; a command
    that would start ranks fails the test."""

    def __init__(self, monkeypatch, capfd):
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def shell(self, script: str, *words: object, **environment: object) -> Done:
        command = ["bash", str(ROOT / script), *map(str, words)]
        said, then, variables = recorded(command, environment_with(**environment))
        if then is None:
            return said
        assert then[1:3] == ["-m", "megatron_vl"]
        done = self.megatron_vl(*then[3:], **variables)
        return Done(done.code, said.out + done.out, said.err + done.err)

    def megatron_vl(self, *words: object, **environment: object) -> Done:
        self.capfd.readouterr()
        on_ctrl_c = signal.getsignal(signal.SIGINT)
        with self.monkeypatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr("megatron_vl.launch.interrupts._ours", [])
            patch.setattr("megatron_vl.launch.launcher.launch", would_start)
            for name, value in environment.items():
                patch.setenv(name, str(value))
            try:
                with pytest.raises(SystemExit) as ended:
                    main([str(word) for word in words])
            finally:
                signal.signal(signal.SIGINT, on_ctrl_c)
        return Done(ended.value.code, *self.capfd.readouterr())


def would_start(argv: list[str], *, nproc_per_node: int, **_):
    raise AssertionError(f"{nproc_per_node} ranks were to start")


@pytest.fixture
def here(monkeypatch, capfd) -> Here:
    return Here(monkeypatch, capfd)


def assert_refused(done: Done, *says: str) -> None:
    """By one sentence of the script or of the command, and nothing beside it."""
    assert done.code == 2, done.text
    (said,) = done.err.splitlines()
    assert said.startswith(("run_mcore_qwen.sh: ", "megatron-vl train: ")), said
    assert all(one in said for one in says), said
    assert "Traceback" not in done.out


def bad(row: str, workshop, out) -> tuple[list[object], dict[str, object]]:
    """The launcher's words and variables with what a row of BAD_ARGUMENTS changes."""
    given = {
        "DATASET_PATH": workshop.wds_dir, "VALID_DATASET_PATH": workshop.wds_dir,
        "OUTPUT_BASEPATH": out, "PRETRAIN_CHECKPOINT_PATH": workshop.weights(1, 1),
    }
    changes, _ = BAD_ARGUMENTS[row]
    environment = {name: value for name, value in changes.items() if name.startswith("MP_")}
    changes = {name: value for name, value in changes.items() if name not in environment}
    return words(**{**given, **changes}), environment


@pytest.mark.parametrize("row", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_before_anything_starts(row, here, workshop, tmp_path):
    typed, environment = bad(row, workshop, tmp_path / "out")
    assert_refused(here.shell(LAUNCHER, *typed, **environment), BAD_ARGUMENTS[row][1])
    assert not (tmp_path / "out").exists()


def test_a_process_is_refused_by_the_same_sentence(here, workshop, tmp_path):
    # Found by the last check before ranks are started.
    typed, environment = bad("an output below a file", workshop, tmp_path / "out")
    done, said = (by(LAUNCHER, *typed, **environment) for by in (shell, here.shell))
    assert (done.code, done.err) == (said.code, said.err)
    assert_refused(done)


@pytest.mark.parametrize("script", [LAUNCHER, CONVERTOR, "toolkits/hf2mcore_convertor.sh"])
def test_too_few_arguments_print_the_usage_table(script):
    done = shell(script, "dsw", "2B")
    assert done.code == 2
    assert "usage:" in done.err and "MODEL_SIZE" in done.err and "TP" in done.err


def test_a_pp0_split_that_does_not_fit_names_those_that_do(here, workshop, tmp_path):
    done = workshop.train("bad-split", by=here.shell, PP=2, first=4, OUTPUT_BASEPATH=tmp_path,
                          PRETRAIN_CHECKPOINT_PATH=workshop.model_dir)
    assert_refused(done, "leaves no language layer for the other")
    assert not list(tmp_path.iterdir())


def test_an_unknown_configuration_key_names_the_nearest(here, tmp_path):
    (tmp_path / "run.yaml").write_text("train_itres: 5\n")
    done = here.megatron_vl("train", "--config", tmp_path / "run.yaml")
    assert_refused(done, "did you mean train_iters")


def copy_of(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


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


def of_megatron(change):
    """Weights whose last stage is changed by `change`."""
    def make(workshop, tmp_path):
        weights = shutil.copytree(workshop.weights(1, 2), tmp_path / "weights")
        file = weights / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        change(content["model"], "language_model.decoder.final_layernorm.weight")
        torch.save(content, file)
        return dict(PRETRAIN_CHECKPOINT_PATH=weights)
    return make


def of_hugging_face(change):
    def make(workshop, tmp_path):
        model = shutil.copytree(workshop.model_dir, tmp_path / "model")
        content = load_file(model / "model.safetensors")
        change(content, "model.norm.weight")
        save_file(content, model / "model.safetensors", {"format": "pt"})
        return dict(PRETRAIN_CHECKPOINT_PATH=model)
    return make


def remove(tensors, name):
    del tensors[name]


def add(tensors, name):
    tensors[f"{name}s"] = tensors[name].clone()


def cut(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


def damage_images(workshop, tmp_path):
    data = copy_of(workshop.wds_dir, tmp_path)
    for shard in data.glob("shard-*.tar"):
        content = shard.read_bytes()
        # The pixels' compressed stream, not the header that tells the size.
        shard.write_bytes(content.replace(b"IDAT", b"IDXT"))
    return dict(DATASET_PATH=data)


# What breaks it, what the sentence names. The launcher looks at datasets and weights before it
# starts ranks.
BAD_FILES = {
    "a missing dataset": (remove_dataset, "no-data"),
    "a missing index": (remove_index, ".nv-meta"),
    "a missing shard": (remove_shard, "shard-"),
    "an empty validation split": (empty_validation, "'val'"),
    **{f"a weight that {how}, {kind}": (of(change), f"{name}{end}")
       for how, change, end in (("is missing", remove, ""), ("nobody knows", add, "s"),
                                ("is cut short", cut, " has shape [63]"))
       for kind, of, name in (
           ("Megatron-Core's", of_megatron, "language_model.decoder.final_layernorm.weight"),
           ("Hugging Face's", of_hugging_face, "model.norm.weight"))},
}
FOUND_BY_RANKS = {
    "corrupt images": (damage_images, "its image or video is unusable"),
}


@pytest.mark.parametrize(("break_it", "names"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_broken_file_is_refused_before_anything_starts(
    break_it, names, here, workshop, tmp_path
):
    changes = break_it(workshop, tmp_path)
    done = workshop.train("broken", by=here.shell, PP=2, OUTPUT_BASEPATH=tmp_path / "out",
                          **changes)
    assert_refused(done, names)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("break_it", "names"), FOUND_BY_RANKS.values(), ids=FOUND_BY_RANKS)
def test_a_broken_file_that_a_rank_finds_is_named_by_one_sentence(
    break_it, names, workshop, tmp_path
):
    changes = break_it(workshop, tmp_path)
    done = workshop.train("broken", PP=2, OUTPUT_BASEPATH=tmp_path / "out", **changes)
    assert done.code == 2, done.text
    sentences = [line for line in done.err.splitlines() if line.startswith("megatron-vl train:")]
    assert len(sentences) == 1 and names in sentences[0], done.text
    assert "Traceback" not in done.text


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
