"""What a run writes beside its checkpoints costs a warning, and never the run."""

import json
from dataclasses import replace

import pytest
from metric_log import STEP, log

from megatron_vl.training.checkpoint.record import OPTIONS, write_options
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.plan import plan_run
from megatron_vl.training.reporting.history import read_history
from megatron_vl.training.reporting.profile import StepProfiler

FULL = "cannot be written (No space left on device); its lines are kept in memory until it can"


def fill(disk):
    """A file that leaves nothing of it free."""
    filler = disk / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def test_a_file_that_takes_nothing_costs_its_lines_and_not_the_run():
    said = []
    one = log(jsonl="/dev/full", say=said.append)
    one.step(STEP)
    one.step(replace(STEP, iteration=2))
    one.close()
    assert [text for text in said if not text.startswith("iteration")] == [
        f"warning: /dev/full {FULL}",
        "warning: /dev/full: 2 lines could not be written and are lost",
    ]


def test_lines_wait_for_room_and_a_half_written_one_is_finished(small_disk):
    file, said = small_disk / "log" / "metrics.jsonl", []
    filler = fill(small_disk)
    one = log(jsonl=file, say=said.append)
    one.step(STEP)
    filler.unlink()
    one.step(replace(STEP, iteration=2))
    filler = fill(small_disk)
    for i in range(3, 21):
        one.step(replace(STEP, iteration=i))
    assert file.read_bytes()[-1:] != b"\n", "the page that was begun holds half a line"
    half = len(read_history(file).steps)
    assert 2 <= half < 20
    filler.unlink()
    one.step(replace(STEP, iteration=21))
    assert [json.loads(text)["iteration"] for text in file.read_text().splitlines()] == [
        *range(1, 22)]
    fill(small_disk)
    for i in range(22, 42):
        one.step(replace(STEP, iteration=i))
    one.close()
    lost = 41 - len(read_history(file).steps)
    assert [text for text in said if text.startswith("warning")] == [
        *[f"warning: {file} {FULL}"] * 3,
        f"warning: {file}: {lost} lines could not be written and are lost",
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_board_that_cannot_be_written_says_so_once(when, small_disk):
    said = []
    if when == "at the start":
        fill(small_disk)
    one = log(tensorboard_dir=str(small_disk / "board"), say=said.append)
    if when == "later":
        fill(small_disk)
    for i in range(1, 40):
        one.step(replace(STEP, iteration=i))
    one.close()
    (warning,) = [text for text in said if text.startswith("warning")]
    assert warning.startswith("warning: TensorBoard failed and gets no more numbers: OSError: ")


def test_a_trace_and_the_options_that_cannot_be_written_are_named(small_disk, model_dir, capsys):
    plan = plan_run(TrainConfig.from_dict({
        "hf_config": str(model_dir), "train_data_path": "x", "save": str(small_disk / "save"),
        "profile": True, "profile_step_start": 1, "profile_step_end": 2,
    }), 1)
    write_options(plan, "cpu")
    before = sorted(small_disk.rglob("*")), (small_disk / "save" / OPTIONS).read_text()
    filler = fill(small_disk)
    write_options(plan, "gloo")
    assert capsys.readouterr().out.startswith(f"warning: {small_disk}/save/{OPTIONS} was not wri")
    profiler = StepProfiler(plan.config.log, small_disk, 0)
    profiler.before(1)
    said = profiler.after(1, last=False)
    assert said.startswith(f"warning: rank 0 could not write {small_disk}/rank0.steps1-1.pt")
    filler.unlink()
    assert before == (sorted(small_disk.rglob("*")), (small_disk / "save" / OPTIONS).read_text())
