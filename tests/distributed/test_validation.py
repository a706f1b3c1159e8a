"""Accuracy is what transformers' decoding comes to, in every layout; the best checkpoint stays."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import pytest
import torch
from commands import ROOT, megatron_vl, run

from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_valid_loader
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.models import family, load_spec
from megatron_vl.models.media import MediaLimits
from megatron_vl.training.checkpoint.export import exported

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "packed": {},
    "one sample a row": {"packing_buffer_size": 0, "micro_batch_size": 2},
    "tp2": TP2 | {"sequence_parallel": True},
    "tp2, logits in chunks": TP2 | {"cross_entropy_chunks": 60},
    "pp2 vp2": PP2 | {"num_virtual_stages_per_pipeline_rank": 2},
    "cp2, every sample alike": {"context_parallel_size": 2, "calculate_per_sample_loss": True},
}
COMMON = {
    "seq_length": 160, "global_batch_size": 4, "packing_buffer_size": 16, "num_workers": 0,
    "video_positions": "transformers5", "shuffle_buffer_size": 100,
}
# The first step, at the beginning of the warmup, changes nothing; the others make all much worse.
BEST = {"lr": 0.5, "lr_warmup_iters": 2, "train_iters": 5, "eval_interval": 1, "eval_iters": 1,
        "report": False, "lr_decay_style": "constant", "save_best": "eval_loss"}
EARLY = {"lr": 0.0, "min_lr": 0.0, "train_iters": 9, "eval_interval": 1, "eval_iters": 1,
         "report": False, "save_interval": 100, "save_best": "eval_loss", "async_save": True}


@pytest.fixture(scope="module")
def out(shared, model_dir, wds_dir, mixed_dir):
    """The folder of every job's SAVE, and what all of them said."""

    def make(out):
        data = f"{wds_dir},{mixed_dir}"
        common = COMMON | {"load": str(model_dir), "train_data_path": data}

        def job(name, **options):
            return common | {"save": str(out / name)} | options

        begun = {"load": str(out / "trained"), "finetune": True}
        same = begun | {"lr": 0.0, "min_lr": 0.0, "train_iters": 1, "eval_interval": 1,
                        "report": False, "no_save_optim": True}
        jobs = [
            job("trained", lr=3e-3, train_iters=24, eval_interval=0, report=False),
            *(job(name, **same | layout) for name, layout in LAYOUTS.items()),
            job("prompts too", **same, train_on_prompt=True),
            job("best", **begun, **BEST, save_interval=3, save_total_limit=1),
            job("behind", **begun, **BEST, save_interval=2, async_save=True),
            job("killed", **begun, **BEST, save_interval=2, killed=[str(out / "behind"), 1]),
            job("early", **EARLY, early_stop=2, export_hf=True),
            job("early", **EARLY, early_stop=2),
            job("early", **EARLY, early_stop=3),
        ]
        out.mkdir()
        (out / "jobs.json").write_text(json.dumps(jobs))
        done = run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", 2, ROOT / "tests/distributed/validating_ranks.py", out])
        assert done.code == 0, done.text
        (out / "said").write_text(done.out)

    return shared.made("validated", make)


def validations(out, name: str) -> list[dict]:
    lines = (out / name / "metrics.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["kind"] == "validation"]


def figures(validation: dict) -> dict:
    """Those that are numbers of tokens and samples; and what is answered."""
    names = ("token_accuracy", "exact_accuracy", "samples", "trained_tokens")
    return {
        **{name: validation[name] for name in names},
        "datasets": {
            dataset: {name: one[name] for name in names if name in one}
            for dataset, one in validation["datasets"].items()
        },
        "answers": [(one["sample"], one["answer"], one["exact"])
                    for one in validation["answers"]],
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_accuracy_and_answers_are_alike_in_every_layout(name, out):
    (found,), (expected,) = validations(out, name), validations(out, "packed")
    assert figures(found) == figures(expected)
    assert len(found["answers"]) == 12 and 0 < found["exact_accuracy"] < 1
    if "every sample" not in name:
        assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-6)
    # The datasets' losses come to the whole one.
    per_dataset = [(one["validation_loss"], one["samples"]) for one in found["datasets"].values()]
    if "every sample" in name:
        whole = sum(loss * samples for loss, samples in per_dataset) / found["samples"]
        assert found["validation_loss"] == pytest.approx(whole, rel=1e-6)


def test_prompts_that_are_trained_are_no_answers(out):
    (found,), (expected,) = validations(out, "prompts too"), validations(out, "packed")
    assert found["trained_tokens"] > 2 * expected["trained_tokens"]
    assert found["token_accuracy"] < expected["token_accuracy"]
    found, expected = figures(found), figures(expected)
    assert found["answers"] == expected["answers"]
    assert found["exact_accuracy"] == expected["exact_accuracy"]


def test_exact_accuracy_is_the_share_that_greedy_decoding_answers_to_the_letter(
    out, model_dir, wds_dir, mixed_dir, tmp_path
):
    done = megatron_vl("convert", out / "trained", tmp_path / "hf", "--to", "hf")
    assert done.code == 0, done.text
    spec = load_spec(model_dir)
    own = family(spec.model_type)
    model = own.judge().from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    mixture = Mixture.parse(f"{wds_dir},{mixed_dir}")
    config = DataConfig(
        train=None, valid=mixture, seq_length=160, packing_buffer_size=0, num_workers=0,
        media=MediaLimits(video_positions="transformers5"),
    )
    right: dict[str, list[bool]] = {}
    for batch in build_valid_loader(config, hf_dir=model_dir, spec=spec, family=own):
        length = batch.sample_lengths[0]
        exact = True
        labels = batch.labels[0, :length]
        (places,) = (labels >= 0).nonzero(as_tuple=True)
        cuts = [0, *(places.diff() > 1).nonzero().flatten().add(1).tolist(), len(places)]
        for begin, end in pairwise(cuts):
            prompt = batch.tokens[0, : places[begin] + 1]
            seen = own.judge_inputs(
                spec, prompt, list(map(tuple, batch.grid_thw.tolist())), batch.pixel_patches,
                batch.position_ids[:, 0, : len(prompt)],
            )
            seen.pop("position_ids", None)
            said = model.generate(
                input_ids=prompt[None], attention_mask=torch.ones(1, len(prompt)).long(),
                max_new_tokens=end - begin, do_sample=False, pad_token_id=0, eos_token_id=None,
                **seen,
            )[0, len(prompt) :]
            exact &= torch.equal(said, labels[places[begin:end]])
        right.setdefault(batch.datasets[0], []).append(exact)
    (found,) = validations(out, "packed")
    assert {name: (sum(one) / len(one), len(one)) for name, one in right.items()} == {
        name: (one["exact_accuracy"], one["samples"]) for name, one in found["datasets"].items()
    }
    every = [one for each in right.values() for one in each]
    assert found["exact_accuracy"] == sum(every) / len(every)


def record(out, name: str) -> dict:
    return json.loads((out / name / "best_checkpoint.json").read_text())


def kept(out, name: str) -> set[int]:
    return {int(path.name.removeprefix("iter_")) for path in (out / name).glob("iter_*")}


@pytest.mark.parametrize("name", ["best", "behind", "killed"])
def test_the_best_checkpoint_is_kept_and_named(name, out):
    found = record(out, name)
    losses = {one["iteration"]: one["eval_loss"] for one in found["validations"]}
    best = min(losses, key=losses.get)
    assert list(losses) == [1, 2, 3, 4, 5] and best == 1
    assert (found["checkpoint"], found["value"]) == (best, losses[best])
    assert best in kept(out, name)
    if name == "best":
        assert kept(out, name) == {best, 5}
    path = out / name / f"iter_{best:07d}"
    assert f"best checkpoint: {path}, eval_loss {losses[best]:.4f}; " in (out / "said").read_text()


def test_a_run_that_was_killed_before_the_record_gives_the_undisturbed_one_s(out):
    assert record(out, "killed") == record(out, "behind")


def test_a_run_without_better_validations_ends_and_does_not_go_on_in_silence(out):
    said = (out / "said").read_text()
    assert "early-stop is 2: of the eval_loss of the last 2 validations none is better" in said
    assert "nothing to do: 3 steps are done, and early-stop is 2" in said
    assert [one["iteration"] for one in record(out, "early")["validations"]] == [1, 2, 3, 4]
    assert kept(out, "early") == {1, 3, 4}  # the best, of equals the first, and where it ended
    assert exported(out / "early").checkpoint == "iter_0000003"
