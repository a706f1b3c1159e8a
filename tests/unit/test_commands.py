"""The command line as a whole: every command starts, and `plot` draws a run."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from commands import environment_with, imports_torch

from megatron_vl.cli.main import COMMANDS, run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_its_options(command, capsys):
    with pytest.raises(SystemExit) as ended:
        run([command, "--help"])
    assert ended.value.code == 0
    assert "--debug" in capsys.readouterr().out


def test_output_that_nobody_reads_to_its_end_is_no_error():
    """As of `megatron-vl ... | head -1`."""
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-m", "megatron_vl", "cluster-env"], stdout=write,
                           stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


BAD_ARGUMENTS = {
    "a word for a number": (
        ["train", "--lr", "fast"], "train", "argument --lr: invalid float value: 'fast'"),
    "a flag one letter off": (
        ["train", "--lrr", "1"], "train", "unrecognized argument --lrr (did you mean --lr?)"),
    "Megatron-LM's flag": (
        ["train", "--freeze-LM"], "train",
        "unrecognized argument --freeze-LM (did you mean --freeze-llm?)"),
    "an abbreviated flag": (
        ["train", "--train-iter=3"], "train",
        "unrecognized argument --train-iter=3 (did you mean --train-iters?)"),
    "a flag like no other": (["plot", "x", "--zzz"], "plot", "unrecognized argument --zzz"),
    "a word too many": (["report", "x", "y"], "report", "unrecognized argument y"),
    "a missing word": (["plot"], "plot", "the following arguments are required: "),
    "an unknown command": (["trian"], "", "argument COMMAND: invalid choice: 'trian'"),
    "no command": ([], "", "the following arguments are required: COMMAND"),
}


@pytest.mark.parametrize(
    ("argv", "command", "sentence"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS
)
def test_a_bad_argument_is_refused_by_one_line(argv, command, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        run(argv)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    program = f"megatron-vl {command}".strip()
    assert len(lines) == 1 and lines[0].startswith(f"{program}: {sentence}"), lines
    assert lines[0].endswith(f"; see {program} --help.")


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_a_command_is_imported_is_one_line(command, capsys, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_vl.cli.main.import_module", interrupt)
    assert run([command]) == 130
    assert capsys.readouterr().err == f"megatron-vl {command}: interrupted\n"


@pytest.mark.cold
def test_ctrl_c_while_train_imports_torch_ends_it_by_one_line(model_dir, wds_dir):
    job = psutil.Popen(
        [sys.executable, "-m", "megatron_vl", "train", "--hf-config", model_dir,
         "--train-data-path", wds_dir, "--global-batch-size", "2"],
        env=environment_with(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not imports_torch(job):
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (130, "megatron-vl train: interrupted\n")


def test_debug_adds_the_traceback_and_keeps_the_code_and_the_sentence(tmp_path, capsys):
    assert run(["convert", str(tmp_path / "none"), str(tmp_path / "out"), "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1].startswith("megatron-vl convert: ")


@pytest.fixture
def metrics(tmp_path):
    """A run's metrics of three steps, the second of them twice, as a resumed run leaves them."""
    steps = [
        {"kind": "train", "iteration": i, "loss": 3.0 - i, "grad_norm": 1.0, "lr": 1e-4,
         "tokens_per_second": 100.0}
        for i in (1, 2, 2, 3)
    ]
    steps.append({"kind": "validation", "iteration": 3, "validation_loss": 0.5})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))
    return path


def test_plot_draws_a_run_given_its_directory_or_its_metrics(metrics, capsys):
    assert run(["plot", str(metrics.parent)]) == 0
    assert run(["plot", str(metrics), "--output", str(metrics.with_name("x.png"))]) == 0
    pictures = [metrics.with_name(name) for name in ("loss.png", "x.png")]
    assert capsys.readouterr().out.split() == [str(picture) for picture in pictures]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("content", "what"), [
    (None, "does not exist"), ("", "holds no training step yet"), ("{}\n", "is not a line of run"),
])
def test_plot_says_what_is_wrong_with_the_metrics(tmp_path, capsys, content, what):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert run(["plot", str(tmp_path)]) == 2
    assert what in capsys.readouterr().err
