"""Adapters in training: the same in every layout and as PEFT's, saved alone, resumed elsewhere.

All runs take steps on the same four microbatches: see training_jobs.py.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from commands import ROOT, megatron_vl, run
from safetensors.torch import load_file, save_file
from training_jobs import CASE

from megatron_vl.training.memory import rank_memory
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.plan import plan_run

STEPS, LR = 4, 1e-2
RUN = {
    "seq_length": 128, "micro_batch_size": 2, "global_batch_size": 8, "train_iters": STEPS,
    "save_interval": 2, "lr": LR, "min_lr": 1e-3, "eval_interval": 0, "num_workers": 0,
    "clip_grad": 0.0, "weight_decay": 0.1, "lora_alpha": 12.0,
}
DISTRIBUTED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LANGUAGE = {"lora_rank": 3}
MIXED = {"lora_rank": 5, "lora_target": ["q_proj", "down_proj", "vit"], "use_rslora": True,
         "lora_lr_ratio": 4.0, "train_merger": True}
DROPPED = {"lora_rank": 3, "lora_dropout": 0.3, "lora_target": ["all-linear", "vit"]}
PATTERNS = {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 7}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 5}}
GIVEN = {"lora_rank": None, "lora_alpha": None, "train_iters": 2}  # and an adapter
ONE_LAYER = {"lora_rank": 3, "lora_target": [r"model\.layers\.0\..*"]}
FUSED = {"lora_rank": 3, "lora_fused": True}
NF4 = {"lora_rank": 3, "quantize_base": "nf4", "load": "wide"}
ALONE = {"one layer": ONE_LAYER, "language": LANGUAGE, "fused": FUSED, "nf4": NF4, "mixed": MIXED,
         "dropped": DROPPED, "fp16": LANGUAGE | {"fp16": True},
         "whole": {"lora_alpha": None, "train_iters": 2},
         "beside a run's": LANGUAGE | {"load": "whole", "finetune": True},
         "ten": LANGUAGE | {"train_iters": 10, "save_interval": 10, "lr_decay_style": "constant",
                            "min_lr": LR}}
SHORT = {  # name -> what is trained, how
    "tp2 sp": ("language", TP2 | DISTRIBUTED | {"sequence_parallel": True}),
    "tp2 fused": ("fused", TP2 | DISTRIBUTED | {"sequence_parallel": True}),
    "tp2": ("mixed", TP2 | DISTRIBUTED | {"recompute_granularity": "full"}),
    "tp2 whole towers": ("mixed", TP2 | {"vit_data_parallel": True}),
    "pp2 uneven": ("language", PP2 | DISTRIBUTED | {"decoder_first_pipeline_num_layers": 1}),
    "vp2": ("mixed", PP2 | DISTRIBUTED | {"num_virtual_stages_per_pipeline_rank": 2}),
    "dp2": ("mixed", DISTRIBUTED),
    "cp2": ("language", {"context_parallel_size": 2, "recompute_granularity": "selective"}),
    "tp2 sp nf4": ("nf4", TP2 | DISTRIBUTED | {"sequence_parallel": True}),
    "pp2 nf4": ("nf4", PP2 | {"recompute_granularity": "full"}),
    "tp2 dropped": ("dropped", TP2 | {"vit_data_parallel": True}),  # ranks see other images
}
AGAIN = {  # name -> as whom, how, whose second step it goes on from
    "tp2 again": ("mixed", TP2 | DISTRIBUTED | {"recompute_granularity": "full"}, "tp2"),
    "pp2 from tp2": ("language", PP2 | DISTRIBUTED | {"load": "moved"}, "tp2 sp"),
    "pp2 nf4 from tp2": ("nf4", PP2 | DISTRIBUTED, "tp2 sp nf4"),
    "pp2 fused": ("fused", PP2, "tp2 fused"),
    "tp2 fp16": ("fp16", TP2, "fp16"),
    "pp2 beside a run's": ("beside a run's", PP2, "beside a run's"),
    "pp2 one stage": ("one layer", PP2 | DISTRIBUTED, None),  # the other has no factor
    "pp2 one stage again": ("one layer", PP2 | DISTRIBUTED, "pp2 one stage"),
    "tp2 with the base": ("language", TP2 | {"save_base": True}, None),
}


def options(out: Path, model_dir: Path, name: str, more: dict, resume=None) -> dict:
    known = {**RUN, **more, "load": str(out / more.get("load", model_dir)), "save": str(out / name),
             "train_data_path": str(out / "data"), "metrics_file": str(out / f"{name}.jsonl"),
             "report": False}
    return known | ({"resume": [resume, 2]} if resume else {})


@pytest.fixture(scope="session")
def jobs(shared, model_dir, wide_model_dir, wds_dir) -> Path:
    """All jobs, run on one rank and on two."""

    def make(out: Path) -> None:
        out.mkdir()
        (out / "data").symlink_to(wds_dir)
        (out / "moved").symlink_to(model_dir)
        (out / "wide").symlink_to(wide_model_dir)
        peft.get_peft_model(
            transformers.AutoModelForImageTextToText.from_pretrained(model_dir),
            peft.LoraConfig(**PATTERNS),
        ).save_pretrained(out / "from peft")
        given = GIVEN | {"adapter": str(out / "from peft")}
        alone = {name: options(out, model_dir, name, one)
                 for name, one in (ALONE | {"given": given}).items()}
        two = {name: options(out, model_dir, name, ALONE[of] | more)
               for name, (of, more) in SHORT.items()}
        two |= {name: options(out, model_dir, name, ALONE[of] | more, resume)
                for name, (of, more, resume) in AGAIN.items()}
        for ranks, some in ((1, alone), (2, two)):
            (out / "jobs.json").write_text(json.dumps(some))
            start = [sys.executable]
            if ranks > 1:
                start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
            done = run([*start, ROOT / "tests/distributed/training_jobs.py", out])
            assert done.code == 0, done.text
            (out / f"said.{ranks}").write_text(done.text)
        shutil.rmtree(out / "from peft")
        for name in ("mixed", "tp2", "tp2 with the base", "tp2 sp nf4", "beside a run's"):
            assert megatron_vl("convert", out / name, out / f"{name} merged", "--merge").code == 0
        for name in ("language", "fused", "ten", "given", "tp2 sp", "pp2 from tp2",
                     "tp2 with the base", "nf4", "tp2 sp nf4", "pp2 nf4 from tp2"):
            done = megatron_vl("convert", out / name, out / f"{name} peft", "--to", "peft")
            assert done.code == 0, done.text

    return shared.made("adapters", make)


def steps(jobs: Path, name: str) -> dict[int, dict]:
    records = map(json.loads, (jobs / f"{name}.jsonl").read_text().splitlines())
    return {one["iteration"]: one for one in records if one["kind"] == "train"}


def held(jobs: Path, name: str, rank: int) -> dict:
    return json.loads((jobs / f"{name}.{rank}.json").read_text())


def factors(jobs: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(jobs / f"{name} peft" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", [name for name in SHORT if "dropped" not in name])
def test_every_layout_trains_the_adapter_as_one_rank_does(name, jobs):
    of, _ = SHORT[name]
    ours, alone = steps(jobs, name), steps(jobs, of)
    assert sorted(ours) == list(range(1, STEPS + 1))
    for i, step in ours.items():
        assert step["loss"] == pytest.approx(alone[i]["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(alone[i]["grad_norm"], rel=1e-4)
        assert step["llm_flops"] == alone[i]["llm_flops"]
    assert alone[STEPS]["loss"] < alone[1]["loss"]


@pytest.mark.parametrize("name", SHORT)
def test_what_is_not_trained_has_no_buffer_and_no_optimizer_state(name, jobs):
    ranks = [held(jobs, name, rank) for rank in range(2)]
    for one in ranks:
        # Every factor begins at a multiple of 64 numbers; the model has 30 times as many.
        assert one["trained"] <= one["buffers"] < 1.2 * one["trained"]
        assert not one["frozen with a gradient"]
    copies = 2 if name in ("dp2", "cp2") else 1  # whose state is divided
    assert sum(one["moments"] for one in ranks) == sum(one["trained"] for one in ranks) / copies


@pytest.mark.parametrize("name", SHORT)
def test_a_rank_holds_what_a_dry_run_says(name, jobs, model_dir):
    of, more = SHORT[name]
    plan = plan_run(TrainConfig.from_dict(options(jobs, model_dir, name, ALONE[of] | more)), 2)
    for rank in range(2):
        ours = held(jobs, name, rank)["bytes"]
        said = rank_memory(plan, plan.layout.coordinates(rank).pp)
        assert (ours["weights"], ours["gradients"]) == (said.weight_bytes, said.gradient_bytes)
        # Padding lies in the shares of the last ranks, and has no state.
        assert 0.9 * said.optimizer_bytes < ours["optimizer"] <= said.optimizer_bytes


def test_training_imports_no_library_for_the_cards_of_one_maker(jobs):
    imported = {*held(jobs, "tp2", 0)["imported"]}
    assert "megatron" in imported and not imported & {"bitsandbytes", "xformers", "deepspeed"}


@pytest.mark.parametrize("name", [name for name in SHORT if name.startswith("tp2")])
def test_what_tensor_parallel_ranks_hold_alike_stays_so(name, jobs):
    one, other = (held(jobs, name, rank)["alike"] for rank in range(2))
    assert len(one) >= 4 and one == other


def test_the_second_factors_have_a_rate_of_their_own(jobs):
    for rates in held(jobs, "dp2", 0)["rates"]:
        rates = {float(rate): now for rate, now in rates.items()}
        assert rates[4 * LR] == pytest.approx(4 * rates[LR])


def test_factors_that_are_dropped_now_and_then_are_dropped_alike_on_tensor_parallel_ranks(jobs):
    """The mask differs from one rank's; what it leaves of the loss does not by much."""
    ours, alone = steps(jobs, "tp2 dropped"), steps(jobs, "dropped")
    assert ours[1]["loss"] == pytest.approx(alone[1]["loss"], rel=1e-6)  # B is zero still
    assert steps(jobs, "dropped")[3]["loss"] != steps(jobs, "language")[3]["loss"]
    assert ours[STEPS]["loss"] == pytest.approx(alone[STEPS]["loss"], rel=0.05)


def test_a_checkpoint_has_the_adapter_alone_and_goes_on_in_any_layout(jobs, model_dir):
    for name, of in (("tp2 again", "tp2"), ("pp2 from tp2", "tp2 sp"),
                     ("pp2 fused", "fused"), ("pp2 one stage again", "one layer"),
                     ("pp2 nf4 from tp2", "tp2 sp nf4")):
        again, undisturbed = steps(jobs, name), steps(jobs, of)
        assert sorted(again) == [3, 4]
        for i in again:
            same = dict(rel=0) if name == "tp2 again" else dict(rel=1e-6)
            assert again[i]["loss"] == pytest.approx(undisturbed[i]["loss"], **same)

    said = (jobs / "said.2").read_text()
    assert f"was trained beside {model_dir} and goes on beside {jobs / 'moved'}" in said

    def size(name: str) -> int:
        return sum(file.stat().st_size for file in (jobs / name / "iter_0000004").rglob("*"))

    # The model has 40 times the factors' numbers, and these are saved with two moments each.
    assert size("language") < size("tp2 with the base") / 4
    for name in ("pp2 from tp2", "tp2 with the base"):
        for key, one in factors(jobs, "tp2 sp").items():
            torch.testing.assert_close(factors(jobs, name)[key], one, rtol=0, atol=1e-5)


def test_an_adapter_beside_quantised_weights_is_merged_into_the_published_ones(
    jobs, wide_model_dir, tmp_path
):
    for name in ("tp2 sp nf4", "pp2 nf4 from tp2"):
        for key, one in factors(jobs, "nf4").items():
            torch.testing.assert_close(factors(jobs, name)[key], one, rtol=0, atol=LR / 100)
    losses = [steps(jobs, "nf4")[i]["loss"] for i in (1, STEPS)]
    plain = wide_model_dir / "model.safetensors"
    made = load_file(jobs / "tp2 sp nf4 merged" / "model.safetensors")
    done = megatron_vl("convert", wide_model_dir, tmp_path / "merged", "--merge",
                       "--adapter", jobs / "tp2 sp nf4 peft")
    assert done.code == 0 and losses[1] < losses[0], done.text
    want, before = load_file(tmp_path / "merged" / "model.safetensors"), load_file(plain)
    for key, one in want.items():
        assert torch.equal(made[key], one)
        assert torch.equal(before[key], one) == (".layers." not in key or "proj.weight" not in key)


VERIFIED = [  # A, B, what is said beside the table, differing, missing in A and in B
    ("language", "language peft", None, [0, 0, 0]),
    ("fused", "fused peft", None, [0, 0, 0]),
    ("tp2 with the base", "tp2 with the base peft", None, [0, 0, 0]),
    ("mixed", "mixed merged", None, [0, 0, 0]),
    ("tp2 with the base merged", "tp2 with the base", None, [0, 0, 0]),
    ("beside a run's", "beside a run's merged", None, [0, 0, 0]),
    ("mixed", "language peft", "rank 3 at scale 4", [8, 40, 20]),
]


@pytest.mark.parametrize(("a", "b", "says", "figures"), VERIFIED)
def test_verify_answers_for_a_run_with_an_adapter(a, b, says, figures, jobs):
    done = megatron_vl("verify", jobs / a, jobs / b)
    found = [int(one) for one in done.out.splitlines()[-1].split()[2:5]]
    assert found == figures and done.code == int(any(figures)), done.text
    assert says is None or says in done.out, done.text


def test_an_adapter_in_fp16_trains_as_in_fp32_and_goes_on_with_its_loss_scale(jobs):
    ours, again, exact = (steps(jobs, name) for name in ("fp16", "tp2 fp16", "language"))
    assert sorted(ours) == [1, 2, 3, 4] and sorted(again) == [3, 4]
    for i in ours:
        assert ours[i]["loss"] == pytest.approx(exact[i]["loss"], rel=1e-3)
        assert ours[i]["grad_norm"] == pytest.approx(exact[i]["grad_norm"], rel=3e-2)
    for i in again:
        assert again[i]["loss"] == pytest.approx(ours[i]["loss"], rel=1e-3)


def test_an_adapter_begins_and_goes_on_beside_what_a_run_trained(jobs):
    before, ours, again = (steps(jobs, name) for name in (
        "whole", "beside a run's", "pp2 beside a run's"))
    assert ours[1]["loss"] < before[1]["loss"] and ours[4]["loss"] < ours[1]["loss"]
    for i in (3, 4):
        assert again[i]["loss"] == pytest.approx(ours[i]["loss"], rel=1e-6)


def test_peft_loads_what_a_run_trained_and_ten_steps_are_its_own(jobs, model_dir):
    """PEFT and torch's AdamW from the same start: losses and every factor."""
    from megatron_vl.data.encode.samples import IGNORE
    from megatron_vl.models import family, load_spec
    from megatron_vl.parity.cases import CASES, make_samples

    spec, of = load_spec(model_dir), family("qwen2_vl")
    samples, positions = make_samples(spec, CASES[CASE]), of.positions(spec)
    ours = factors(jobs, "ten")
    base = transformers.AutoModelForImageTextToText.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, jobs / "ten peft", is_trainable=True)
    found = {name.replace(".default", ""): parameter
             for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == ours.keys()  # PEFT has a place for each factor
    assert all(torch.equal(found[name], one) for name, one in ours.items())
    for name, one in begin(model_dir).items():
        found[name].data.copy_(one)
    optimizer = torch.optim.AdamW(found.values(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    trained = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
    for step in range(1, 11):
        total = 0.0
        for sample in samples:
            inputs = of.judge_inputs(spec, sample.tokens, sample.grids, sample.patches,
                                     positions(sample.tokens, sample.grids, sample.seconds))
            logits = model(input_ids=sample.tokens[None], use_cache=False, **inputs).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits, sample.labels, ignore_index=IGNORE, reduction="sum") / trained
            loss.backward()
            total += float(loss.detach())
        assert steps(jobs, "ten")[step]["loss"] == pytest.approx(total, rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    for name, one in ours.items():  # apart by a little of one step
        torch.testing.assert_close(found[name].detach(), one, rtol=0, atol=LR / 100, msg=name)


def begin(model_dir: Path) -> dict[str, torch.Tensor]:
    """The factors that every run begins with, in any layout."""
    from megatron_vl.models import family, load_spec
    from megatron_vl.peft.adapter import Adapter, Factors
    from megatron_vl.peft.adapter_map import AdapterMap
    from megatron_vl.peft.lora import _drawn
    from megatron_vl.peft.targets import resolve

    weights = family("qwen2_vl").weight_map(load_spec(model_dir))
    adapter = Adapter(factors=dict.fromkeys(resolve(weights, ["all-linear"]), Factors(3, 12.0)))
    made = {}
    for one in AdapterMap(weights=weights, adapter=adapter).whole():
        a = one.stored("A", tp=1, rank=0, local=True)
        drawn = _drawn(one, a, seed=1234)
        for piece in a.pieces:
            made[piece.key] = drawn[piece.at[0] : piece.at[0] + piece.shape[0]]
        for key, shape in one.published().items():
            made.setdefault(key, torch.zeros(shape))
    return {f"base_model.model.model.language_model.{key.removeprefix('model.')}": one
            for key, one in made.items()}


def test_a_merger_trained_in_full_goes_into_the_merged_model_and_not_into_an_adapter(
    jobs, model_dir
):
    before, one, two = (load_file(folder / "model.safetensors") for folder in (
        model_dir, jobs / "mixed merged", jobs / "tp2 merged"))
    moved = {key.split(".")[-2] for key in before if not torch.equal(before[key], one[key])}
    assert moved >= {"q_proj", "down_proj", "qkv", "proj", "fc1", "fc2", "0", "2"}
    assert not moved & {"k_proj", "up_proj", "embed_tokens", "lm_head"}
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=LR / 20)
    done = megatron_vl("convert", jobs / "mixed", jobs / "none", "--to", "peft")
    assert done.code == 2 and "--train-merger, which an adapter has no place for" in done.err
    done = megatron_vl("convert", jobs / "mixed", jobs / "mixed hf", "--to", "hf")
    assert done.code == 0 and "mixed is merged into" in done.out, done.text
    again = load_file(jobs / "mixed hf" / "model.safetensors")
    assert all(torch.equal(again[key], one[key]) for key in one)


def test_an_adapter_of_pefts_goes_on_without_its_directory_and_keeps_ranks_and_alphas(
    jobs, model_dir, wds_dir
):
    options = [word for name, value in RUN.items() if name != "lora_alpha"
               for word in (f"--{name.replace('_', '-')}", value)]
    done = megatron_vl("train", *options, "--load", model_dir, "--train-data-path", wds_dir,
                       "--save", jobs / "given", "--adapter", jobs / "from peft", "--dry-run")
    assert done.code == 0 and not (jobs / "from peft").exists(), done.text
    found = peft.PeftConfig.from_pretrained(jobs / "given peft")
    assert found.use_rslora
    for name, rank, alpha in (("layers.0.mlp.down_proj", 4, 6), ("layers.1.mlp.down_proj", 4, 5),
                              ("layers.1.self_attn.q_proj", 7, 6)):
        name = f"model.language_model.{name}"
        assert found.rank_pattern.get(name, found.r) == rank
        assert found.alpha_pattern.get(name, found.lora_alpha) == alpha


def test_a_run_goes_on_with_its_own_adapter_alone(jobs, model_dir, wds_dir, tmp_path):
    given = ["train", "--load", model_dir, "--train-data-path", wds_dir, "--dry-run",
             "--seq-length", 128, "--micro-batch-size", 2, "--global-batch-size", 8]
    same = [*given, "--lr", LR, "--min-lr", 1e-3, "--weight-decay", 0.1, "--train-iters", STEPS]
    for more, says in (
        (["--lora-rank", 4], "was trained with lora-rank 3 but this run has 4"),
        ([], "was trained with lora-rank 3 but this run has None"),
        (["--lora-rank", 3, "--lora-alpha", 12, "--quantize-base", "int8"],
         "was trained with quantize-base None but this run has int8"),
        (["--lora-rank", 3, "--lora-lr-ratio", 2], "was trained with lora-lr-ratio 1.0 but"),
    ):
        done = megatron_vl(*same, "--save", jobs / "language", *more)
        assert done.code == 2 and says in done.err, done.text
    gone = ["--save", jobs / "language", "--lora-rank", 3, "--lora-alpha", 12, "--load", "gone"]
    done = megatron_vl(*same, *gone)
    assert done.code == 2 and "load gone is not there yet" in done.err, done.text
    done = megatron_vl(*(word for word in same if word != "--dry-run"), *gone)
    assert done.code == 2 and "--load gone does not exist" in done.err, done.text
    changed = shutil.copytree(jobs / "language", tmp_path / "run")
    (changed / "began_with.json").write_text(json.dumps(
        {"load": str(model_dir), "weights": {"model.safetensors": "12 bytes 0123456789ab"}}))
    done = megatron_vl(*same, "--save", changed, "--lora-rank", 3, "--lora-alpha", 12)
    assert done.code == 2 and "which had other weights than --load" in done.err, done.text
    done = megatron_vl(*given, "--load", jobs / "language", "--lora-rank", 3)
    assert done.code == 2 and "holds an adapter of the model" in done.err, done.text
    done = megatron_vl(*given, "--load", jobs / "whole", "--lora-rank", 3)
    assert done.code == 2 and "add --finetune to take the weights alone" in done.err, done.text
    done = megatron_vl(*given, "--adapter", jobs / "language peft")
    assert done.code == 0 and "of the adapter" in done.out, done.text


def test_numbers_that_are_none_are_told_of_an_adapter_and_at_every_start_of_what_it_is_beside(
    model_dir, wds_dir, tmp_path
):
    base, given = shutil.copytree(model_dir, tmp_path / "base"), tmp_path / "peft"
    peft.get_peft_model(
        transformers.AutoModelForImageTextToText.from_pretrained(model_dir),
        peft.LoraConfig(r=3, target_modules=["down_proj"]),
    ).save_pretrained(given)
    for file, end in ((base / "model.safetensors", "down_proj.weight"),
                      (given / "adapter_model.safetensors", "down_proj.lora_A.weight")):
        weights = load_file(file)
        next(weights[key] for key in weights if key.endswith(f"1.mlp.{end}"))[0, 0] = torch.nan
        save_file(weights, file, {"format": "pt"})
    for iteration, bad in ((1, {"down_proj.weight", "down_proj.lora_A.weight"}),
                           (2, {"down_proj.weight"})):
        done = megatron_vl(
            "train", "--load", base, "--adapter", given, "--quantize-base", "int8", "--save",
            tmp_path / "run", "--train-data-path", wds_dir, "--seq-length", 128, "--train-iters",
            iteration, "--lr-decay-iters", 1, "--eval-interval", 0, "--no-report",
        )
        told = re.findall(r"WARNING: 1 numbers of (\S+) are NaN or infinite", done.out)
        assert done.code == 0 and {one.split("layers.1.mlp.")[1] for one in told} == bad, done.text


def test_a_fused_adapter_has_an_a_of_its_own_for_every_layer_in_pefts_files(
    jobs, model_dir, wds_dir
):
    def layers_of(name: str) -> set[frozenset[str]]:
        """Those with an equal A."""
        found = {}
        for key, one in factors(jobs, name).items():
            if ".lora_A." in key:
                found.setdefault(one.numpy().tobytes(), set()).add(key.split(".")[-3])
        return set(map(frozenset, found.values()))

    assert layers_of("fused") == {
        frozenset(one.split()) for one in ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj",
                                           "down_proj")}
    assert all(len(one) == 1 for one in layers_of("language"))
    assert steps(jobs, "fused")[STEPS]["loss"] != steps(jobs, "language")[STEPS]["loss"]
    assert steps(jobs, "fused")[STEPS]["llm_flops"] < steps(jobs, "language")[STEPS]["llm_flops"]
    for name, code, says in (("fused peft", 0, "of the adapter"),
                             ("language peft", 2, "self_attn.k_proj.weight, and those of adapter")):
        done = megatron_vl("train", "--load", model_dir, "--train-data-path", wds_dir, "--dry-run",
                           "--lora-fused", "--adapter", jobs / name, "--seq-length", 128)
        assert done.code == code and says in done.text, done.text


def test_an_adapter_is_of_a_model_that_is_given(model_dir, wds_dir):
    given = ["train", "--hf-config", model_dir, "--train-data-path", wds_dir, "--lora-rank", 3]
    done = megatron_vl(*given)
    assert done.code == 2 and "give load its directory" in done.err, done.text
    done = megatron_vl(*given, "--load", "not yet there", "--dry-run")
    assert done.code == 0 and "load not yet there is not there yet" in done.out, done.text


REFUSED = [  # what is typed beside a model, and what is said
    (["--lora-alpha", 4], "lora-alpha is about an adapter, and none is trained; give lora-rank"),
    (["--lora-rank", 0], "lora-rank"),
    (["--lora-rank", 4, "--vit-lr", "1e-4"], "vit-lr is given but lora-rank keeps"),
    (["--lora-rank", 4, "--adapter", "x"], "lora-rank is given but adapter x says it itself"),
    (["--lora-rank", 4, "--train-vit", "--freeze-vit"], "train-vit and freeze-vit exclude"),
    (["--quantize-base", "nf4"], "quantize-base is about an adapter, and none is trained"),
    (["--lora-rank", 4, "--quantize-base", "fp4"], "(choose from 'nf4', 'int8')"),
    (["--lora-rank", 4, "--quantize-base", "nf4", "--save-base"], "save-base saves the model's"),
    (["--lora-rank", 4, "--quantize-base", "nf4", "--bf16", "--fp8-format", "hybrid"],
     "fp8-format needs layers of TransformerEngine's"),
    (["--lora-rank", 4, "--quantize-base", "nf4", "--cpu-offloading"],
     "cpu-offloading needs layers of TransformerEngine's"),
    (["--lora-rank", 4, "--lora-target", "lm_head"], "lora-target lm_head names no linear layer"),
    (["--lora-r", 4, "--train-iters", 3], "use lora-rank"),
]


@pytest.mark.parametrize(("typed", "says"), REFUSED)
def test_what_makes_no_sense_is_refused(typed, says, model_dir, wds_dir):
    done = megatron_vl("train", "--load", model_dir, "--train-data-path", wds_dir, *typed)
    assert done.code == 2 and says in done.err, done.text
