"""SAVE/hf: made along the way and at the end, by a process of its own that costs no step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest
import torch
from commands import ROOT, megatron_vl, run
from transformers import AutoModelForImageTextToText

from megatron_vl.training.checkpoint.export import EXPORTED, Exporter, exported
from megatron_vl.training.reporting.history import read_history
from megatron_vl.training.reporting.page import page_text

STEPS = 3
JOBS = {  # exports; the second one's SAVE/hf holds what is not to be replaced
    "along": {"export_hf_interval": 1, "async_save": True, "save_total_limit": 1},
    "fails": {"export_hf": True},
}


@pytest.fixture(scope="module")
def made(shared, model_dir, wds_dir) -> Path:
    """Both jobs, on one rank; what they said is in `said`."""

    def train(out: Path) -> None:
        (out / "fails" / "hf").mkdir(parents=True)
        (out / "fails" / "hf" / "notes.txt").touch()
        (out / "jobs.json").write_text(json.dumps({
            name: {
                "load": str(model_dir), "save": str(out / name), "save_interval": 1,
                "train_data_path": str(wds_dir), "num_workers": 0, "seq_length": 192,
                "micro_batch_size": 2, "global_batch_size": 8, "train_iters": STEPS,
                "eval_interval": 0, "bf16": True, "report": False,
                "metrics_file": str(out / f"{name}.jsonl"), **options,
            } for name, options in JOBS.items()
        }))
        done = run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", 1, ROOT / "tests/distributed/training_jobs.py", out])
        assert done.code == 1, done.text
        (out / "said").write_text(done.text)

    return shared.made("exports", train)


def test_the_export_is_what_a_conversion_of_the_newest_checkpoint_is(made, model_dir):
    save = made / "along"
    newest = f"iter_{STEPS:07d}"
    assert exported(save).checkpoint == newest and (save / newest).is_dir()
    said = (made / "said").read_text()
    for name in ("iter_0000001", newest):
        assert f"exported {save / name} to {save / 'hf'} in " in said
    again = made / "again"
    for words in (["verify", save, save / "hf"], ["convert", save, again, "--to", "hf"]):
        done = megatron_vl(*words)
        assert done.code == 0, done.text
    names = {one.name: one for one in (save / "hf").iterdir() if one.name != EXPORTED}
    assert names.keys() == {one.name for one in again.iterdir()}
    assert all(one.read_bytes() == (again / name).read_bytes() for name, one in names.items())
    # Of what the run trained in, which config.json says as the model's own does.
    config, given = (json.loads((one / "config.json").read_text())
                     for one in (save / "hf", model_dir))
    assert config == given | {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in given}
    tokens = torch.arange(60, 76)[None]
    logits = [AutoModelForImageTextToText.from_pretrained(one)(tokens).logits
              for one in (save / "hf", again)]
    assert logits[0].dtype == torch.bfloat16 and torch.equal(*logits)
    assert f"{newest} for transformers" in page_text(read_history(made / "along.jsonl"))


def test_an_export_that_fails_is_said_and_costs_no_step(made):
    save, said = made / "fails", (made / "said").read_text()
    last = save / f"iter_{STEPS:07d}"
    (line,) = [line for line in said.splitlines() if line.startswith("NOT EXPORTED")]
    assert line.startswith(f"NOT EXPORTED: {last}: {save / 'hf'} holds no checkpoint"), line
    assert f"megatron-vl convert {last} {save / 'hf'} --to hf" in line
    assert "the run is done, but it could not be exported" in said
    assert [one.name for one in (save / "hf").iterdir()] == ["notes.txt"]
    steps = [json.loads(line) for line in (made / "fails.jsonl").read_text().splitlines()]
    assert [one["iteration"] for one in steps if one["kind"] == "train"] == [1, 2, 3]
    assert (last / "SHA256SUMS").is_file()


def test_of_exports_that_wait_the_newest_is_made_and_none_is_deleted_meanwhile(made):
    said: list[str] = []
    others = set(psutil.Process().children())
    exporter = Exporter(said.append)
    checkpoints = [made / "fails" / f"iter_{number:07d}" for number in (1, 2, 3)]
    for one in checkpoints:
        exporter.export(one)
    assert said == [f"{checkpoints[1]} is not exported: iter_0000001 still is, and iter_0000003 is "
                    f"newer"]
    assert exporter.held == {"iter_0000001", "iter_0000003"}
    (process,) = set(psutil.Process().children()) - others
    process.kill()
    while exporter.held != {"iter_0000003"}:
        assert exporter.poll()
    assert said[1].startswith(f"NOT EXPORTED: {checkpoints[0]}: its process was ended by SIGKILL; ")
    exporter.give_up(checkpoints[2], "the run is not at its end")
    assert not exporter.poll() and not exporter.held
    assert said[2].startswith(f"{checkpoints[2]} is not exported, as the run is not at its end")
    assert not list((made / "fails").glob(".hf*"))
