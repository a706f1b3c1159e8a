"""What is shown of a run: the line, the files, the totals, the bar, the slowest rank."""

import ast
import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace

import pytest
from metric_log import STEP, VALIDATION, Kept, line, log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vl.errors import InputError
from megatron_vl.parallel import Layout
from megatron_vl.training.reporting.history import read_history
from megatron_vl.training.reporting.metrics import MetricLog, duration
from megatron_vl.training.reporting.padding import PaddingWatch
from megatron_vl.training.reporting.report import smoothed
from megatron_vl.training.reporting.throughput import Throughput
from megatron_vl.training.resilience.stragglers import Straggler, Stragglers

# ---- the line ---------------------------------------------------------------------------------


def test_the_line_says_everything_once():
    assert line(log()) == (
        "iteration 1/2 | {'loss': 3.0000, 'grad_norm': 1.000, 'learning_rate': 1.000e-03} | "
        "2,400 tokens/s, 2,000 without padding | 60.0 images/s | tokens per sample: 50.0 | "
        "data wait 10.0% | memory 1.00 GiB | elapsed time per iteration (ms): 500.0 | ETA 0:01"
    )
    assert "\n" not in line(log())


# As scripts that read the logs of transformers' Trainer, Megatron-LM and MindSpeed-MM have them.
PARSERS = {
    r"'loss': ([\d.]+)": "3.0000",
    r"'loss': (-?\d+\.\d+)": "3.0000",
    r"'grad_norm': ([\d.]+)": "1.000",
    r"'learning_rate': ([\d.e-]+)": "1.000e-03",
    r"iteration\s+(\d+)/": "1",
    r"elapsed time per iteration \(ms\): ([\d.]+)": "500.0",
    r"tokens per sample:([^|]+)": " 50.0 ",
}


@pytest.mark.parametrize("pattern", PARSERS)
def test_known_parsers_find_their_number(pattern):
    assert re.search(pattern, line(log())).group(1) == PARSERS[pattern]


def test_the_numbers_in_braces_are_a_python_dictionary():
    found = ast.literal_eval(re.search(r"\{.*?\}", line(log())).group())
    assert found == {"loss": 3.0, "grad_norm": 1.0, "learning_rate": 1e-3}


def test_utilization_is_shown_where_the_peak_is_known():
    assert "MFU" not in line(log())
    shown = line(log(ranks=4, peak_flops=10e12))
    assert "MFU 20.0% = vision 5.0% + LLM 15.0%" in shown


def test_the_load_of_experts_is_shown_where_there_are_any():
    load = {"expert_load_max": 2.314, "expert_load_min": 0.1, "idle_experts": 3}
    assert "| busiest expert 2.31x the mean | memory" in line(log(), replace(STEP, experts=load))
    full = load | {"routed_tokens": 4000, "dropped_tokens": 1100}
    assert "| busiest expert 2.31x the mean | experts dropped 1,100 tokens (27.5%) | memory" in (
        line(log(), replace(STEP, experts=full)))
    kept = Kept()
    log(trackers=kept, say=lambda _: None).step(replace(STEP, experts=full))
    assert kept.got[0][1].items() >= {f"train/{name}": one for name, one in full.items()}.items()


def test_what_went_wrong_is_at_the_line_s_end():
    slow = Straggler(ranks=(2, 3), hosts=("node1",), ratio=1.52)
    shown = line(log(), replace(STEP, slowest=slow, skipped=True, skipped_samples={"too long": 2}))
    assert shown.endswith(
        "ETA 0:01 | slowest ranks 2-3 (node1): 1.5x the others' forward | "
        "2 samples left out (2 too long) | SKIPPED: the gradient is too large for the loss scale"
    )


def test_a_step_says_why_it_was_skipped():
    shown = line(log(), replace(STEP, skipped=True, fault="the loss is not finite"))
    assert shown.endswith("SKIPPED: the loss is not finite")


def test_what_is_left_is_told_by_the_time_between_steps_not_by_that_in_them():
    said = []
    one = MetricLog(1002, jsonl=None, tensorboard_dir=None, say=said.append)
    one.step(replace(STEP, step_seconds=0.001))
    time.sleep(0.2)  # as a validation and a checkpoint
    one.step(replace(STEP, iteration=2, step_seconds=0.001))
    assert said[0].endswith("ETA 0:01") and re.search(r"ETA 3:[2-5]\d$", said[1]), said


def test_a_skipped_step_does_not_end_the_smoothed_curve():
    curve = smoothed([math.nan, 1.0, 2.0, math.inf, 3.0])
    assert math.isnan(curve[0]) and math.isnan(curve[3]) and curve[1:3] == [1.0, 2.0]
    long = [math.nan if at == 50 else float(at) for at in range(100)]
    assert smoothed(long)[50] == 50.0


def test_the_smoothed_curve_does_not_lag():
    falling = [5.0 - 0.01 * at for at in range(500)]
    assert smoothed(falling) == pytest.approx(falling)
    noisy = [value + (-1) ** at for at, value in enumerate(falling)]
    middle = [abs(a - b) for a, b in zip(smoothed(noisy), falling, strict=True)][20:-20]
    assert max(middle) < 0.05


@pytest.mark.parametrize(("buffer", "tokens", "steps", "says"), [
    (0, 40, 10, "60% of what the model goes through is padding: with packing-buffer-size"),
    (0, 50, 10, None), (0, 40, 9, None),
    (64, 10, 10, "90% of what the model goes through is padding: packing-buffer-size is 64"),
])
def test_more_than_half_padding_is_said_once(buffer, tokens, steps, says):
    watch = PaddingWatch(buffer)
    told = [watch.add(100, tokens) for _ in range(steps)]
    assert not any(told[:-1])
    assert told[-1].startswith(says) if says else not told[-1]
    assert steps < 10 or not watch.add(100, 0), "once"


def test_a_short_run_is_told_of_its_padding_at_its_end():
    assert PaddingWatch(0).add(100, 10, last=True)


def test_durations_read_like_clocks():
    assert [duration(s) for s in (5, 95, 7265)] == ["0:05", "1:35", "2:01:05"]


# ---- the files --------------------------------------------------------------------------------


def test_every_step_goes_to_the_files_and_every_line_to_trackers(tmp_path):
    said, kept = [], Kept()
    one = MetricLog(3, jsonl=tmp_path / "log" / "metrics.jsonl", log_interval=2, say=said.append,
                    tensorboard_dir=str(tmp_path / "board"), trackers=kept, peak_flops=10e12)
    for i in (1, 2, 3):
        one.step(replace(STEP, iteration=i, loss=1 / i))
    one.evaluation(3, VALIDATION, epoch=0.5)
    one.evaluation(3, VALIDATION)
    one.close()
    assert [text[:14] for text in said] == ["iteration 2/3 ", "iteration 3/3 "] + [
        "validation at ", "  of a: loss 2", "  of b: loss 3"] * 2
    assert ("| {'eval_loss': 2.5000, 'eval_token_accuracy': 0.7500, 'eval_exact': 0.5000, "
            "'epoch': 0.50} | perplexity 12.182 | 4 samples, 50 trained tokens | 1.0 s") in said[2]
    assert said[3] == "  of a: loss 2.0000, token accuracy 50.0%, exact answers 25.0% of 3 samples"
    run = read_history(tmp_path / "log")
    assert [step["loss"] for step in run.steps] == [1.0, 0.5, 1 / 3]  # not rounded
    first = run.steps[0]
    assert (first["llm_tokens_per_second"], first["tokens_per_second"]) == (2400, 2000)
    assert (first["vision_mfu"], first["llm_mfu"], first["llm_flops_per_second"]) == (.2, .6, 6e12)
    (validation,) = run.validations
    assert validation["validation_loss"] == 2.5 and validation["exact_accuracy"] == 0.5
    assert validation["datasets"]["b"]["validation_loss"] == 3.0
    # Pictures are written once.
    lines = (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()
    asked = [one.get("answers", [{}])[0].get("question") for one in map(json.loads, lines)]
    assert asked[-2:] == ["What?", None]
    assert list((tmp_path / "board").glob("events*"))
    assert kept.got[2][1]["validation/token_accuracy/a"] == 0.5
    assert [got[0] for got in kept.got[:-1]] == [2, 3, 3, 3] and kept.got[-1] == "closed"
    assert kept.got[0][1]["train/loss"] == 0.5


def test_a_resumed_run_counts_its_later_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"kind": "train", "iteration": i, "loss": loss}
            for i, loss in ((1, 3.0), (2, 2.0), (2, 1.9), (3, 1.5))]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [s["loss"] for s in read_history(file).steps] == [3.0, 1.9, 1.5]
    file.write_text("not json")
    with pytest.raises(InputError, match=r"metrics.jsonl:1 is not a line of run metrics"):
        read_history(file)


def test_a_line_that_a_killed_run_left_unfinished_is_taken_off(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for end, steps in (('{"kind": "train", "iter', [1, 2]), ("", [1, 2])):
        file.write_text('{"kind": "train", "iteration": 1}\n' + end)
        one = log(jsonl=file, say=lambda _: None)
        one.step(replace(STEP, iteration=2))
        one.close()
        assert [step["iteration"] for step in read_history(file).steps] == steps
    for begin in ('{"ki', '{"kind": "train", "iteration": 1}\n{"ki'):
        file.write_text(begin)
        log(jsonl=file).close()
        assert file.read_text() == begin.removesuffix('{"ki')
    for own in ("somebody's own, without a newline", 'a list\n{"k'):
        file.write_text(own)
        log(jsonl=file).close()
        assert file.read_text() == own


def test_a_last_line_without_its_end_is_kept(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"kind": "train", "iteration": 1}')  # as an editor may leave it
    one = log(jsonl=file, say=lambda _: None)
    one.step(replace(STEP, iteration=2))
    one.close()
    assert [step["iteration"] for step in read_history(file).steps] == [1, 2]


def test_a_line_that_a_live_run_has_not_finished_is_not_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = '{"kind": "train", "iteration": 1}\n{"kind": "train", "iteration": 2}\n'
    for cut in range(len(whole)):
        file.write_text(whole[:cut])
        assert len(read_history(file).steps) == (cut > 32) + (cut > 66)
    file.write_text(whole[:40] + "\n" + whole)
    with pytest.raises(InputError, match=r"metrics.jsonl:2 is not a line .*; remove the line"):
        read_history(file)


@pytest.mark.parametrize(("done", "begin"), [(0, (1, 2)), (4, (5,)), (6, ())])
def test_what_a_run_did_not_go_on_from_is_left_out(done, begin, tmp_path):
    """The first start made six steps; the second goes on after `done`."""
    file = tmp_path / "metrics.jsonl"
    rows = [{"kind": "run", "done": 0}]
    rows += [{"kind": kind, "iteration": i, "start": 1} for i in range(1, 7)
             for kind in ("train", "validation", "ranks")]
    rows += [{"kind": "run", "done": done}]
    rows += [{"kind": "train", "iteration": i, "start": 2} for i in begin]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_history(file)
    known = list(range(1, done + 1)) + list(begin)
    assert [one["iteration"] for one in run.steps] == known
    assert [one["iteration"] for one in run.validations] == list(range(1, done + 1))
    assert (run.ranks and run.ranks["iteration"]) == (done or None)
    assert len(run.starts) == 2


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_in_the_history(tmp_path):
    file = tmp_path / "metrics.jsonl"
    one = log(jsonl=file, say=lambda _: None)
    one.start({"done": 0, "hosts": [math.inf]})
    one.step(replace(STEP, loss=math.nan, grad_norm=math.inf))
    one.evaluation(1, replace(VALIDATION, figures=replace(VALIDATION.figures, loss=math.nan)))
    one.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    records = [json.loads(text, parse_constant=refuse) for text in file.read_text().splitlines()]
    assert records[0]["hosts"] == [None] and records[1]["loss"] is None
    run = read_history(file)
    assert all(math.isnan(run.steps[0][name]) for name in ("loss", "grad_norm"))
    assert math.isnan(run.validations[0]["validation_loss"])


def test_tensorboard_shows_a_step_that_was_made_twice_once(tmp_path):
    for done, steps, loss in ((0, (1, 2, 3, 4), 1.0), (2, (3,), 2.0)):
        one = MetricLog(9, done=done, jsonl=None, tensorboard_dir=str(tmp_path),
                        say=lambda _: None)
        for i in steps:
            one.step(replace(STEP, iteration=i, loss=loss))
        one.close()
        time.sleep(1.1)  # the files are told apart, and read in order, by their second
    board = EventAccumulator(str(tmp_path)).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert shown == [(1, 1.0), (2, 1.0), (3, 2.0)]


# ---- totals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "left_out"), [(1, 0), (6, 3), (40, 10)])
def test_averages_leave_the_first_steps_out_and_say_so(steps, left_out):
    totals = Throughput(steps, ranks=4)
    for i in range(1, steps + 1):
        totals.add(replace(STEP, iteration=i, step_seconds=100.0 if i <= left_out else 0.5))
    lines = totals.lines()
    assert f"iterations {left_out + 1} to {steps}" in lines[0]
    assert (f"the first {left_out} left out" in lines[0]) == (left_out > 0)
    assert lines[1:6] == [
        "Elapsed Time Per iteration: 500.0 ms", "Average Samples per Second: 40.000",
        "Consumed Tokens per Second: 2000.000",
        "Tokens per Second per Device (TGS): 500.000 on 4 devices",
        "Consumed Tokens per Second with padding: 2400.000",
    ]
    counted = steps - left_out
    assert lines[-1] == (f"Total: {1000 * counted:,} tokens, {20 * counted:,} samples, "
                         f"{30 * counted:,} images or videos in {counted / 2:.1f} s")


# ---- the slowest rank -------------------------------------------------------------------------

# TP2, PP2, DP2: ranks 0-1 and 2-3 are replicas of stage 0, 4-5 and 6-7 of stage 1.
STRAGGLERS = {
    "alike": ([1.0] * 8, None),
    "another stage has more to do": ([1, 1, 1, 1, 3, 3, 3, 3], None),
    "one replica": ([1, 1, 1, 2, 3, 3, 3, 3], (2, 3)),
    "the worse of two": ([1, 1, 2, 2, 9, 9, 3, 3], (4, 5)),
    "below the threshold": ([1, 1, 1.2, 1.2, 3, 3, 3, 3], None),
}


@pytest.mark.parametrize(("seconds", "named"), STRAGGLERS.values(), ids=STRAGGLERS)
def test_the_slowest_of_those_with_the_same_layers_is_named(seconds, named):
    looked = Stragglers(Layout(tp=2, pp=2, dp=2), [f"node{rank // 4}" for rank in range(8)])
    looked.add(seconds, 12.0)
    assert looked.slowest() is None  # a step alone says nothing
    for _ in range(3):
        looked.add(seconds, 12.0)
    found = looked.slowest()
    assert (found and found.ranks) == named
    if named:
        assert found.hosts == (f"node{named[0] // 4}",)


def test_one_slow_step_or_a_delay_nobody_feels_names_no_one():
    looked = Stragglers(Layout(dp=2), ["a", "b"])
    for seconds in ([1, 1], [1, 9], [1, 1], [1, 1]):
        looked.add(seconds, 4.0)
    assert looked.slowest() is None
    unfelt = Stragglers(Layout(dp=2), ["a", "b"])
    for _ in range(4):
        unfelt.add([1.0, 1.5], 100.0)
    assert unfelt.slowest() is None


def test_without_another_replica_nobody_is_named():
    looked = Stragglers(Layout(pp=2), ["a", "b"])
    for _ in range(4):
        looked.add([1.0, 9.0], 10.0)
    assert looked.slowest() is None and looked.typical() == [1.0, 9.0]


# ---- the bar ----------------------------------------------------------------------------------

BAR = """
from megatron_vl.training.reporting.progress import Console
console = Console()
console.start(2, 4)
for i in (3, 4):
    console.say(f"line {i}")
    console.step(1 / i)
console.close()
console.say("done")
"""


def on_a_terminal(code: str) -> str:
    """What a program writes to its terminal."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=side, stderr=side)
    os.close(side)
    said = b""
    while True:
        try:
            more = os.read(main, 1 << 16)
        except OSError:  # what a terminal answers when its last writer has gone
            break
        if not more:
            break
        said += more
    os.close(main)
    assert process.wait() == 0, said.decode()
    return said.decode()


def test_a_bar_stays_below_the_lines_on_a_terminal_and_is_nowhere_else():
    said = on_a_terminal(BAR)
    assert "training:  50%" in said and "4/4" in said and "loss 0.2500" in said
    # Each line begins where the bar was wiped away, and ends before it is drawn again.
    assert re.search(r"\r *\rline 3\r\n", said) and re.search(r"\r *\rline 4\r\n", said)
    piped = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True, check=True)
    assert (piped.stdout, piped.stderr) == ("line 3\nline 4\ndone\n", "")
