"""Frozen parts and rates by part: what changes, what does not, in every kind of layout.

All runs take steps on the same four microbatches: see training_jobs.py.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from commands import ROOT, megatron_vl, run
from safetensors.torch import load_file
from shared import Shared
from training_jobs import CASE

from megatron_vl.cli.main import run as command
from megatron_vl.errors import InputError
from megatron_vl.training.checkpoint.start import find_checkpoint
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.plan import plan_run

PARTS = ("vit", "merger", "llm")
COMBINATIONS = [set(some) for size in range(3) for some in combinations(PARTS, size)]
STEPS = 2
LR, MIN_LR, VIT_LR, MERGER_LR = 1e-3, 1e-4, 3e-4, 2e-3

RUN = {
    "seq_length": 128, "micro_batch_size": 2, "global_batch_size": 8, "train_iters": STEPS,
    "save_interval": STEPS, "lr": LR, "min_lr": MIN_LR, "eval_interval": 0, "num_workers": 0,
    "packing_buffer_size": 0, "use_distributed_optimizer": False,
}
DISTRIBUTED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VP2 = PP2 | {"num_virtual_stages_per_pipeline_rank": 2}
UNEVEN = PP2 | {"decoder_first_pipeline_num_layers": 1}
RECOMPUTE = {"recompute_granularity": "full"}
RATES = {"vit_lr": VIT_LR, "merger_lr": MERGER_LR}

WEIGHTS = {  # how they are converted
    "any": ["--format", "torch_dist"],
    # Stage 0 has vision layers alone;
    "spread": ["--pp", 2, "--vit-pp-layers", "1,1", "--pp-layers", "0,4"],
    # stage 1 the embedding and, on another chunk, its copy.
    "spread vp": ["--pp", 2, "--vp", 2, "--vit-pp-layers", "1,1,0,0", "--pp-layers", "0,2,1,1"],
}


def title(frozen) -> str:
    return "-".join(sorted(frozen)) or "nothing"


# On two ranks: name -> (frozen parts, further options, weights).
SHORT = {
    f"pp2 {title(frozen)}": (frozen, UNEVEN | (DISTRIBUTED if number % 2 else {}), "any")
    for number, frozen in enumerate(COMBINATIONS)
} | {
    "tp2 sp": ({"llm"}, TP2 | {"sequence_parallel": True}, "any"),
    "tp2": ({"vit"}, TP2 | DISTRIBUTED | RECOMPUTE, "any"),
    "tp2 whole towers": ({"vit", "llm"}, TP2 | DISTRIBUTED | {"vit_data_parallel": True}, "any"),
    "dp2": ({"vit", "llm"}, DISTRIBUTED, "any"),
    "dp2 plain": ({"vit", "merger"}, {"overlap_grad_reduce": True}, "any"),
    "cp2": ({"vit"}, {"context_parallel_size": 2, **DISTRIBUTED}, "any"),
    "vp2": ({"llm"}, VP2 | DISTRIBUTED | RECOMPUTE, "any"),
    "spread, nothing to train on stage 0": ({"vit"}, PP2 | DISTRIBUTED, "spread"),
    "spread, nothing to train before the embedding": ({"vit", "merger"}, PP2, "spread"),
    "spread, the tower alone": ({"merger", "llm"}, PP2 | DISTRIBUTED, "spread"),
    "spread vp, a frozen embedding twice": ({"llm"}, VP2, "spread vp"),
    "spread vp": ({"vit"}, VP2 | DISTRIBUTED, "spread vp"),
}  # fmt: skip
LONG = {"train_iters": 4, "lr_warmup_iters": 1}
BF16 = ({"llm"}, UNEVEN | LONG | RATES | {"bf16": True}, "any")
# Stage 0 counts no updates, and is the one whose count is saved.
FP16 = (
    {"vit"}, PP2 | DISTRIBUTED | LONG | {"fp16": True, "initial_loss_scale": 64.0}, "spread",
)  # fmt: skip
OTHER = {"override_opt_param_scheduler": True, "vit_lr": None, "merger_lr": VIT_LR}
FURTHER = {
    "rates": (set(), UNEVEN | RATES | {"adam_eps": 1e-4, "weight_decay": 0.1}, "any"),
    "a rate of 0": (set(), UNEVEN | DISTRIBUTED | {"vit_lr": 0.0}, "any"),
    "bf16": BF16, "fp16": FP16,
    "bf16 again": (*BF16, "bf16"), "fp16 again": (*FP16, "fp16"),
    "other rates": (BF16[0], BF16[1] | OTHER, "any", "bf16"),
}  # fmt: skip


class Jobs:
    """What the jobs left behind."""

    def __init__(self, shared: Shared, out: Path, model_dir: Path):
        self.shared, self.out, self.start = shared, out, load_file(model_dir / "model.safetensors")

    def options(self, name, frozen, options, weights, resume=None) -> dict:
        known = {
            **RUN, **options, **{f"freeze_{part}": True for part in frozen},
            "load": str(self.out / f"{weights} weights"), "save": str(self.out / name),
            "train_data_path": str(self.out / "data"),
            "metrics_file": str(self.out / f"{name}.jsonl"), "report": False,
        }  # fmt: skip
        return known | ({"resume": [resume, 2]} if resume else {})

    def run(self, ranks: int, jobs: dict) -> None:
        (self.out / "jobs.json").write_text(
            json.dumps({name: self.options(name, *job) for name, job in jobs.items()})
        )
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        done = run([*start, ROOT / "tests/distributed/training_jobs.py", self.out])
        assert done.code == 0, done.text

    def steps(self, name) -> dict[int, dict]:
        lines = (self.out / f"{name}.jsonl").read_text().splitlines()
        records = map(json.loads, lines)
        return {one["iteration"]: one for one in records if one["kind"] == "train"}

    def held(self, name, rank) -> dict:
        return json.loads((self.out / f"{name}.{rank}.json").read_text())

    def home(self, name) -> dict[str, torch.Tensor]:
        """The trained checkpoint as Hugging Face tensors."""

        def convert(out: Path) -> None:
            assert command(["convert", str(self.out / name), str(out)]) == 0

        return load_file(self.shared.made(f"freezing {name} hf", convert) / "model.safetensors")

    def changed(self, name) -> set[str]:
        after = self.home(name)
        assert after.keys() == self.start.keys()
        return {key for key in after if not torch.equal(after[key], self.start[key])}


@pytest.fixture(scope="session")
def jobs(shared, model_dir, wds_dir) -> Jobs:
    """All jobs, run: on two ranks, and each combination of frozen parts on one."""

    def make(out: Path) -> None:
        out.mkdir()
        (out / "data").symlink_to(wds_dir)
        for name, options in WEIGHTS.items():
            words = ["convert", model_dir, out / f"{name} weights", *options]
            assert command([str(word) for word in words]) == 0
        jobs = Jobs(shared, out, model_dir)
        jobs.run(1, {title(frozen): (frozen, {}, "any") for frozen in COMBINATIONS})
        jobs.run(2, SHORT | FURTHER)

    return Jobs(shared, shared.made("freezing", make), model_dir)


def part(tensor: str) -> str:
    """The part of a published tensor; the norm before the merger is the vision tower's last."""
    if tensor.startswith("visual.merger.mlp."):
        return "merger"
    return "vit" if tensor.startswith("visual.") else "llm"


@pytest.mark.parametrize("name", SHORT)
def test_exactly_the_parts_that_are_not_frozen_change_and_as_on_one_rank(name, jobs):
    frozen, *_ = SHORT[name]
    trained = {tensor for tensor in jobs.start if part(tensor) not in frozen}
    # A key bias moves every score of a query alike: its gradient is zero, up to rounding.
    still = {tensor for tensor in trained if tensor.endswith("k_proj.bias")}
    assert trained - still <= jobs.changed(name) <= trained
    steps, alone = jobs.steps(name), jobs.steps(title(frozen))
    assert sorted(steps) == list(range(1, STEPS + 1))
    for i, step in steps.items():
        assert step["loss"] == pytest.approx(alone[i]["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(alone[i]["grad_norm"], rel=1e-4)
        assert step["lr"] == alone[i]["lr"]
    assert alone[2]["loss"] < alone[1]["loss"]


@pytest.mark.parametrize("name", SHORT)
def test_frozen_weights_have_no_buffer_no_optimizer_state_and_no_graph(name, jobs):
    frozen = SHORT[name][0]
    ranks = [jobs.held(name, rank) for rank in range(2)]
    for held in ranks:
        assert held["buffers"] == held["trained"] and not held["frozen with a gradient"]
    copies = 2 if name in ("dp2", "cp2") else 1  # whose state is divided
    assert sum(h["moments"] for h in ranks) == sum(h["trained"] for h in ranks) / copies
    # Stage 0, or both ranks of one stage, see images.
    assert ranks[0]["vision graph"] == ("vit" not in frozen)
    if name.startswith("spread, nothing"):
        assert ranks[0]["trained"] == 0 and not ranks[1]["vision graph"]


def test_the_parts_are_told_at_the_start(jobs):
    counts = dict.fromkeys(PARTS, 0)
    for tensor, values in jobs.start.items():
        counts[part(tensor)] += values.numel()
    vit, merger, llm = (f"{counts[part]:,}" for part in PARTS)
    assert (
        f"{counts['vit'] + counts['merger']:,} of {sum(counts.values()):,} parameters are trained: "
        f"vision tower {vit} at lr 3.000e-04, merger {merger} at lr 2.000e-03, language model "
        f"{llm} frozen"
    ) in jobs.held("bf16", 0)["said"]


def schedule(rate: float, low: float) -> list[float]:
    """Four steps: warmup from 0 in one, then the cosine."""
    return [0.0, *(low + (rate - low) * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3))]


def test_each_part_has_its_rate_over_warmup_and_decay(jobs):
    """The language model is frozen, and the log shows the base rate all the same."""
    for rank in range(2):
        rates = jobs.held("bf16", rank)["rates"]
        for rate in (VIT_LR, MERGER_LR):
            seen = [step[str(rate)] for step in rates]
            assert seen == pytest.approx(schedule(rate, MIN_LR * rate / LR))
    logged = [step["lr"] for _, step in sorted(jobs.steps("bf16").items())]
    assert logged == pytest.approx(schedule(LR, MIN_LR))


def test_a_rate_of_0_leaves_exactly_its_part_as_it_was(jobs):
    changed = {part(tensor) for tensor in jobs.changed("a rate of 0")}
    assert changed == {"merger", "llm"}


def test_two_updates_with_three_rates_are_those_of_torch_and_transformers(
    jobs, model_dir, tmp_path
):
    from safetensors.torch import save_file

    from megatron_vl.models import load_spec
    from megatron_vl.parity.cases import CASES
    from megatron_vl.parity.judge import run_transformers

    spec = load_spec(model_dir)
    weights = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in jobs.start.items()}
    rates = {"vit": VIT_LR, "merger": MERGER_LR, "llm": LR}
    optimizer = torch.optim.AdamW([
        {"params": [w for name, w in weights.items() if (part(name), w.dim() > 1) == (one, matrix)],
         "name": one, "weight_decay": 0.1 if matrix else 0.0}
        for one in PARTS for matrix in (False, True)
    ], betas=(0.9, 0.95), eps=1e-4)  # fmt: skip
    directory = model_dir
    for step, decay in enumerate((1.0, 0.55), 1):  # cosine from 1 to a tenth, half way
        gradients = run_transformers(directory, spec, CASES[CASE]).gradients
        assert gradients.keys() == weights.keys()
        for name, weight in weights.items():
            weight.grad = gradients[name]
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        assert jobs.steps("rates")[step]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = rates[group["name"]] * decay
        optimizer.step()
        directory = tmp_path / f"reference {step}"
        directory.mkdir()
        for file in model_dir.glob("*.json"):
            (directory / file.name).write_bytes(file.read_bytes())
        save_file({name: w.detach() for name, w in weights.items()},
                  directory / "model.safetensors", metadata={"format": "pt"})
    ours = jobs.home("rates")
    for name, weight in weights.items():  # apart by two roundings, or a little of a step
        torch.testing.assert_close(
            ours[name], weight.detach(), rtol=2.4e-7, atol=1e-4 * rates[part(name)], msg=name
        )
        assert not torch.equal(weight, jobs.start[name]), name


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_run_with_frozen_parts_and_rates_resumes_exactly(name, jobs):
    again, undisturbed = jobs.steps(f"{name} again"), jobs.steps(name)
    assert sorted(again) == [3, 4]
    for i in again:
        for number in ("loss", "grad_norm", "lr"):
            assert again[i][number] == undisturbed[i][number]
    assert all(torch.equal(jobs.home(name)[k], v) for k, v in jobs.home(f"{name} again").items())
    assert jobs.held(f"{name} again", 1)["rates"] == jobs.held(name, 1)["rates"][2:]


def find(options: dict) -> None:
    plan = plan_run(TrainConfig.from_dict(options), 2)
    find_checkpoint(plan.config, plan.spec)


def test_other_rates_are_refused_on_resume_until_they_are_meant(jobs):
    options = jobs.options("bf16", *FURTHER["other rates"][:3])
    with pytest.raises(InputError, match="with vit-lr 0.0003 but this run has 0.001"):
        find(options | {"override_opt_param_scheduler": False})
    for rank in range(2):
        rates = jobs.held("other rates", rank)["rates"]
        for rate in (LR, VIT_LR):
            expected = schedule(rate, MIN_LR * rate / LR)[2:]
            assert [step[str(rate)] for step in rates] == pytest.approx(expected)


def test_another_frozen_set_is_refused_on_resume(jobs):
    options = jobs.options("bf16", {"llm", "merger"}, UNEVEN | LONG | {"bf16": True}, "any")
    options["override_opt_param_scheduler"] = True
    with pytest.raises(InputError, match="freeze-merger false but this run has true; .*no-load"):
        find(options)
    find(options | {"no_load_optim": True})


def test_a_resampler_is_trained_without_its_tower_and_its_positions_where_asked(
    resampler_model_dir, wds_dir, tmp_path
):
    before, pool = load_file(resampler_model_dir / "model.safetensors"), "visual.attn_pool."
    positions = f"transformer.{pool}pos_embed"
    merger = sum(weight.numel() for name, weight in before.items() if pool in name)
    for options, says in (
        ([], "constant 1,024 (train-constants trains them)"),
        (["--train-constants"], f"merger {merger:,} at lr"),
    ):
        save, home = tmp_path / "run" / str(len(options)), tmp_path / "home" / str(len(options))
        done = megatron_vl(
            "train", "--load", resampler_model_dir, "--train-data-path", wds_dir, "--freeze-vit",
            "--train-iters", 1, "--seq-length", 128, "--micro-batch-size", 1,
            "--global-batch-size", 1, "--lr", 1e-3, "--eval-interval", 0, "--num-workers", 0,
            "--save", save, *options,
        )
        assert done.code == 0 and says in done.text, done.text
        assert megatron_vl("convert", save, home, "--to", "hf").code == 0
        after = load_file(home / "model.safetensors")
        moved = {name for name, weight in before.items()
                 if not torch.equal(weight, after[name]) and "visual" in name}
        trained = {name for name in before if pool in name}
        assert moved == (trained if options else trained - {positions})
