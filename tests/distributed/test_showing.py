"""What real runs show: totals, traces, the page, and a rank that is slow."""

import gzip
import json
import re
import socket
import sys

import pytest
from commands import ROOT, megatron_vl, run

from megatron_vl.training.reporting.history import read_history


@pytest.fixture(scope="module")
def shown(workshop, plain_run):
    """The folder of a run that was told to show everything."""
    (folder,) = (workshop.root / "plain" / "log").iterdir()
    return folder


def test_every_step_knows_its_flops_its_memory_and_what_the_devices_could_do(plain_run):
    for step in plain_run.values():
        assert step["vision_flops"] > step["llm_flops"] / 100 and step["llm_flops"] > 0
        assert step["positions"] == 4 * 256 >= step["tokens"]
        assert step["memory_bytes"] > 2**27
        used = (step["vision_flops"] + step["llm_flops"]) / step["step_seconds"] / 1e11
        assert step["vision_mfu"] + step["llm_mfu"] == pytest.approx(used)


def test_the_first_steps_of_every_stage_are_compared_with_what_was_predicted(
    workshop, uneven_run, plain_run
):
    for name, stages in (("plain", 1), ("uneven", 2)):
        (file,) = (workshop.root / name / "log").glob("*/metrics.jsonl")
        found = read_history(file).compared
        assert found["iteration"] == 10 and found["memory_bytes"] is None  # of a CPU
        assert len(found["predicted"]["memory_bytes"]) == stages
        for forward, backward in zip(found["forward"], found["backward"], strict=True):
            assert min(forward, backward) > 0
            assert forward + backward < 1.5 * found["step_seconds"]  # medians of noisy steps


def test_a_trace_holds_the_forward_and_backward_passes_of_its_steps(workshop, plain_run):
    (board,) = (workshop.root / "plain" / "tensorboard").iterdir()
    (trace,) = board.glob("*.pt.trace.json.gz")
    assert trace.name == "rank0.steps3-4.pt.trace.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert "aten::scaled_dot_product_attention" in names
    backward = [name for name in names if "evaluate_function: EmbeddingBackward" in name]
    assert len(backward) == 2 * 4  # two steps of four microbatches


def test_the_page_of_a_run_is_written_at_its_end_and_can_be_made_again(shown):
    page = (shown / "report.html").read_text()
    for what in ("<h2>plots</h2>", "<h2>layout: TP1xPP1xDP1</h2>", "iter_0000010", "MFU",
                 "<td>0-3</td>", "seq-length", "<h2>prediction and fact, to iteration 10</h2>"):
        assert what in page, what
    done = megatron_vl("report", shown, "--output", shown / "again.html")
    assert done.code == 0, done.text

    def text(page: str) -> str:
        return re.sub(r'src="data:[^"]+"', "", page)

    assert text((shown / "again.html").read_text()) == text(page)


def test_real_runs_are_drawn_over_each_other(shown, tmp_path):
    done = megatron_vl("plot", shown, shown / "metrics.jsonl", "--output", tmp_path / "two.png")
    assert done.code == 0, done.text
    assert (tmp_path / "two.png").stat().st_size > 20_000


def test_a_rank_that_is_really_slow_is_named(model_dir, wds_dir, tmp_path):
    options = {
        "micro_batch_size": 2, "global_batch_size": 8, "seq_length": 192, "train_iters": 6,
        "eval_interval": 0, "save_interval": 100, "hf_config": str(model_dir),
        "train_data_path": str(wds_dir), "report": False, "num_workers": 0, "log_interval": 1,
    }
    jobs = {
        name: options | {"metrics_file": str(tmp_path / f"{name}.jsonl"), **more}
        for name, more in (("alike", {}), ("slow", {"slow": [1, 0.5]}))
    }
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                2, ROOT / "tests/distributed/training_jobs.py", tmp_path])
    assert done.code == 0, done.text
    alike, slow = (read_history(tmp_path / f"{name}.jsonl") for name in jobs)
    named = slow.steps[-1]["slowest"]
    assert named["ranks"] == [1] and named["hosts"] == [socket.gethostname()]
    assert f"slowest rank 1 ({socket.gethostname()}): " in done.out
    # The sleep is in that rank's time alone: the other waits for it elsewhere.
    mine, other = (slow.ranks["forward_seconds"][rank] for rank in (1, 0))
    assert mine > 2 * 0.5 > other
    assert alike.ranks["forward_seconds"][1] < 2 * 0.5
