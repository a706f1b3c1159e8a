"""Whole runs on a device that is none of the CPU's, in every kind of layout: see shadow/device.py.

A mix-up of devices ends such a run. Its numbers are the CPU's, to the bit, and how often a step
waits for the device is told.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from commands import ROOT, megatron_vl, run

from megatron_vl.cli.main import run as command
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.models.common.balance import Balance
from megatron_vl.models.registry import load_spec
from megatron_vl.parity.balance import balance_loss, loads
from megatron_vl.parity.cases import cases, make_samples

RUN = {
    "seq_length": 128, "micro_batch_size": 2, "global_batch_size": 4, "train_iters": 2,
    "save_interval": 9, "lr": 1e-3, "min_lr": 1e-4, "eval_interval": 0, "num_workers": 0,
    "use_distributed_optimizer": True, "overlap_grad_reduce": True, "async_save": True,
    "report": False,
    "packing_buffer_size": 8,
    # The operators that the shadow device has of the CPU, so that its numbers are the CPU's.
    "attention_backend": "sdpa", "fused_ops": "off",
}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VP2 = PP2 | {"num_virtual_stages_per_pipeline_rank": 2}
OFFLOAD = {
    "fine_grained_activation_offloading": True, "min_offloaded_tensor_size": 1,
    "offload_modules": ["qkv_linear", "core_attn", "attn_proj", "attn_norm", "mlp_norm"],
}
LAYOUTS = {
    "dp2": {},
    "dp2, weights gathered behind": {"overlap_param_gather": True},
    "tp2 sp": TP2 | {"sequence_parallel": True},
    "tp2, images divided": TP2 | {"vit_data_parallel": True},
    "pp2": PP2,
    "pp2, rows of several lengths": PP2 | {"packing_buffer_size": 0, "vary": True},
    "vp2": VP2,
    "pp2, offloaded": PP2 | OFFLOAD | {"eval_interval": 1, "eval_iters": 1},
    "cp2": {"context_parallel_size": 2, "recompute_granularity": "selective"},
}
WINDOWS = {  # of Qwen2.5-VL
    "windows, tp2 sp": TP2 | {"sequence_parallel": True},
    "windows, a tower over pp2": PP2 | {"vit_pp_layers": "1,1", "pp_layers": "0,4"},
}
QUANTIZED = {
    "an adapter beside nf4, tp2 sp": TP2 | {
        "sequence_parallel": True, "lora_rank": 3, "quantize_base": "nf4", "lora_dropout": 0.3},
}
EXPERTS = {
    # With weights that stay, so that both steps' tokens go where those of the first go.
    "experts, tp2 sp": TP2 | {
        "sequence_parallel": True, "recompute_granularity": "full", "lr": 0, "min_lr": 0,
        "moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.5,
        "moe_z_loss_coeff": 0.1, "calculate_per_sample_loss": True},
    "experts, ep2, some full": {
        "expert_model_parallel_size": 2, "moe_expert_capacity_factor": 1.0,
        "moe_router_load_balancing_type": "seq_aux_loss", "moe_grouped_gemm": "on",
        "overlap_param_gather": True},
}
FEATURES = {  # of Qwen3-VL, some for a layer of another stage
    "features over pp2": PP2 | {"pp_layers": "1,3", "recompute_granularity": "full"},
}
# Other numbers than the CPU's, whose norms compute in fp32.
BF16 = {"dp2 bf16": {"grad_reduce_in_bf16": True}}
# By the kernels of torch_npu, whose sums are others.
OWN = {"attention_backend": "auto", "fused_ops": "auto"}
KERNELS = {
    "kernels, tp2 sp": TP2 | OWN | {"sequence_parallel": True},
    "windows by kernels": OWN | {"recompute_granularity": "selective"},
    "features by kernels over pp2": PP2 | OWN | {"pp_layers": "1,3"},
}
# Goes on from the first step of another, with a validation behind the second.
RESUMED = {
    one: f"{one} again"
    for one in ("dp2, weights gathered behind", "tp2, images divided", "vp2", *QUANTIZED)
}
SAVED = (*RESUMED, "dp2")
OF_LAYOUTS = LAYOUTS | QUANTIZED
AGAIN = {one: OF_LAYOUTS[one] | {"save_interval": 1} for one in SAVED}
EXACT = LAYOUTS | WINDOWS | FEATURES | EXPERTS | QUANTIZED | AGAIN | {
    again: OF_LAYOUTS[name] | {"resume": [name, 1], "eval_interval": 2, "eval_iters": 1}
    for name, again in RESUMED.items()
}
TWO = ("tp2 sp", *QUANTIZED)
JOBS = EXACT | KERNELS | {name: options | {"bf16": True} for name, options in BF16.items()}
# Once a chunk: Megatron-Core asks behind the last microbatch whether a token was trained.
AFTER_ALL = (
    "megatron/core/distributed/finalize_model_grads.py:finalize_model_grads: _local_scalar_dense"
)
# Once a step each: for the loss and for the gradient's norm, after which it is known whether there
# is an update, and for what is logged. Nothing is queued any more when the second is read.
WAITS = {
    "megatron_vl/training/step.py:mean_loss: copy between host and device": 1,
    "megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32: _local_scalar_dense": 1,
    "megatron_vl/training/resilience/stragglers.py:gather: copy between host and device": 1,
}
# Experts' tokens are told apart by how many they are, for which Megatron-Core's dispatcher asks in
# every layer; what our router counts is read once a step.
DISPATCHES = ("megatron/core/transformer/moe/token_dispatcher.py:",
              "megatron/core/transformer/moe/moe_utils.py:permute:")
LOADS = {"megatron_vl/training/reporting/experts.py:take: copy between host and device": 1}
DEVICES = "npu", "cpu"
PROGRAM, SITE = (ROOT / "tests" / "shadow" / one for one in ("ranks.py", "site"))
# A user's environment: torch loads torch_npu when asked to, which then makes CUDA mean NPU.
TRANSFERRED = "npu, transferred"
OF_A_USER = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "TORCH_TRANSFER_TO_NPU": "1"}


@pytest.fixture(scope="module")
def runs(
    shared, model_dir, window_model_dir, deepstack_model_dir, experts_model_dir, wds_dir
) -> dict[str, Path]:
    """What the jobs left behind, by the device they ran on."""
    others = dict.fromkeys([*WINDOWS, "windows by kernels"], window_model_dir)
    others |= dict.fromkeys([*FEATURES, "features by kernels over pp2"], deepstack_model_dir)
    others |= dict.fromkeys(EXPERTS, experts_model_dir)

    def make(out: Path) -> None:
        weights = out / "weights"
        assert command(["convert", str(model_dir), str(weights), "--format", "torch_dist"]) == 0
        for device in (*DEVICES, TRANSFERRED):
            folder = out / device
            folder.mkdir()
            (folder / "jobs.json").write_text(json.dumps({
                name: RUN | options | {
                    "load": str(others.get(name, weights)),
                    "save": str(folder / name),
                    "train_data_path": str(wds_dir), "valid_data_path": str(wds_dir),
                    "metrics_file": str(folder / f"{name}.jsonl"),
                }
                for name, options in JOBS.items() if device in DEVICES or name in TWO
            }))
            done = run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc-per-node", 2, PROGRAM, folder, device.partition(",")[0]],
                       **(OF_A_USER if device == TRANSFERRED else {}))
            assert done.code == 0, done.text

    root = shared.made("shadow", make)
    return {device: root / device for device in (*DEVICES, TRANSFERRED)}


def numbers(folder: Path, name: str) -> dict:
    """Losses and norms by kind and iteration."""
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return {
        (one["kind"], one["iteration"]): (one.get("loss", one.get("validation_loss")),
                                          one.get("grad_norm"))
        for one in map(json.loads, lines) if one["kind"] in ("train", "validation")
    }


@pytest.mark.parametrize("name", EXACT)
def test_a_run_gives_the_numbers_of_the_cpu_to_the_bit(name, runs):
    found = numbers(runs["npu"], name)
    assert found == numbers(runs["cpu"], name)
    if name in RESUMED.values():
        assert list(found) == [("train", 2), ("validation", 2)]
    else:
        assert [one for one in found if one[0] == "train"] == [("train", 1), ("train", 2)]


@pytest.mark.parametrize("name", TWO)
def test_a_run_after_transfer_to_npu_takes_no_npu_for_cuda_and_gives_them_too(name, runs):
    assert numbers(runs[TRANSFERRED], name) == numbers(runs["cpu"], name)
    said = json.loads((runs[TRANSFERRED] / f"{name}.0.json").read_text())["said"]
    assert said.startswith("npu: this project has never run on an NPU") and " on npu, " in said


def test_parity_holds_on_an_npu(hf_dir):
    done = megatron_vl("parity", hf_dir, PYTHONPATH=f"{SITE}{os.pathsep}{ROOT}")
    assert done.code == 0 and "equal within 1e-05" in done.out, done.text


@pytest.mark.parametrize("name", KERNELS)
def test_a_run_by_the_kernels_of_npus_comes_to_the_numbers_of_the_cpu(name, runs):
    expected, found = (numbers(runs[device], name) for device in ("cpu", "npu"))
    said = json.loads((runs["npu"] / f"{name}.0.json").read_text())["said"]
    assert "attention: npu-fusion" in said and "rotary npu, swiglu npu" in said
    assert "norms npu" in said and list(found) == [("train", 1), ("train", 2)]
    for step, (loss, norm) in expected.items():
        # Measured: the same loss, and norms by 8e-8.
        assert found[step] == (pytest.approx(loss, rel=1e-6), pytest.approx(norm, rel=1e-6))


def test_weights_that_are_gathered_when_they_are_asked_for_give_the_same_numbers_to_the_bit(runs):
    assert numbers(runs["npu"], "dp2, weights gathered behind") == numbers(
        runs["npu"], "dp2")


def test_weights_are_gathered_before_they_are_saved(runs):
    whole, gathered = (str(runs["npu"] / one / "iter_0000001")
                       for one in ("dp2", "dp2, weights gathered behind"))
    config = str(runs["npu"].parent / "weights")
    assert command(["verify", whole, gathered, "--hf-config", config]) == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BF16)
def test_gradients_summed_in_bf16_come_close_in_half_the_memory(name, device, runs):
    exact, found = (numbers(runs[device], one) for one in ("dp2", name))
    for step, (loss, norm) in exact.items():
        # Measured: 2e-4 and 4e-3.
        assert found[step] == (pytest.approx(loss, rel=1e-3), pytest.approx(norm, rel=1e-2))
    held, full = (json.loads((runs[device] / f"{one}.0.json").read_text())["bytes"]["gradients"]
                  for one in (name, "dp2"))
    assert 2 * held == full


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_to_the_bit(name, runs):
    steps = numbers(runs["npu"], name)
    assert numbers(runs["npu"], RESUMED[name])["train", 2] == steps["train", 2]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", JOBS)
def test_the_host_never_waits_for_the_device_in_a_microbatch_and_seldom_in_a_step(name, rank, runs):
    waits = json.loads((runs["npu"] / f"{name}.{rank}.json").read_text())["waits"]
    chunks = 2 if name.startswith("vp2") else 1
    schedule = waits.pop("schedule")
    if name in EXPERTS:
        schedule = {line: n for line, n in schedule.items() if not line.startswith(DISPATCHES)}
    # Megatron-Core 0.19 has none in the schedule either.
    assert schedule in ({AFTER_ALL: chunks}, {})
    assert waits == {"step": WAITS | (LOADS if name in EXPERTS else {}), "validation": {}}


def test_what_modules_save_waits_on_the_host_and_changes_rounding_alone(runs):
    name = "pp2, offloaded"
    found, plain = (numbers(runs["npu"], one) for one in (name, "pp2"))
    for step, figures in plain.items():
        assert found[step] == pytest.approx(figures, rel=1e-6)
    offloaded = json.loads((runs["npu"] / f"{name}.0.json").read_text())["offloaded"]
    assert set(offloaded["modules"]) == set(OFFLOAD["offload_modules"])
    assert offloaded["bytes"], "in the second step, behind a validation"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", JOBS)
def test_no_weight_is_used_before_it_would_be_waited_for(name, rank, runs):
    assert json.loads((runs["npu"] / f"{name}.{rank}.json").read_text())["unasked"] == []


# ---- experts ------------------------------------------------------------------------------------

TRAINED = [1, 2], [2, 3]  # microbatches of the case in each of the two steps


@pytest.fixture(scope="module")
def case_of_experts(experts_model_dir) -> tuple[torch.nn.Module, list[list]]:
    """transformers' model, and the samples of each microbatch."""
    spec = load_spec(experts_model_dir)
    case = cases(spec, True)[0]
    samples, size = make_samples(spec, case), case.samples_per_row * case.rows_per_microbatch
    model = transformers.AutoModelForCausalLM.from_pretrained(
        experts_model_dir, dtype=torch.float32, experts_implementation="eager")
    return model, [samples[i : i + size] for i in range(0, len(samples), size)]


def lines(folder: Path, name: str, kind: str) -> list[dict]:
    found = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return [one for one in found if one["kind"] == kind]


def test_experts_have_the_tokens_and_gradients_transformers_gives_them(case_of_experts, runs):
    """Once, although every layer runs again, and on the rank that has them; no padding. Their
    losses have the weight of the samples' own."""
    model, microbatches = case_of_experts
    k, name = model.config.num_experts_per_tok, "experts, tp2 sp"
    given = [[model(one.tokens[None], output_router_logits=True) for one in group]
             for group in microbatches]
    routes = [[one.router_logits for one in group] for group in given]
    each = [loads(group, k) for group in routes]
    (line,) = lines(runs["cpu"], name, "experts")
    assert line["tokens"] == sum(each[at] for step in TRAINED for at in step).tolist()
    assert (line["iteration"], line["steps"]) == (2, 2)
    for step, found in zip(TRAINED, lines(runs["cpu"], name, "train"), strict=True):
        load = sum(each[at] for at in step)
        over_mean = load / load.mean(1, keepdim=True)
        assert found["expert_load_max"] == pytest.approx(float(over_mean.max()))
        assert found["expert_load_min"] == pytest.approx(float(over_mean.min()))
        assert found["idle_experts"] == int((load == 0).sum()) and "dropped_tokens" not in found
        main = [torch.nn.functional.cross_entropy(out.logits[0], one.labels, ignore_index=IGNORE)
                for at in step for out, one in zip(given[at], microbatches[at], strict=True)]
        whole = sum(main) / len(main)
        assert found["loss"] == pytest.approx(float(whole), rel=1e-6)
        for figure, coeff, of in (
            ("load_balancing_loss", 0.5, Balance(loss="global_aux_loss", coeff=1.0)),
            ("router_z_loss", 0.1, Balance(z_coeff=1.0)),
        ):
            # The second microbatch, of as many samples, is balanced together with the first.
            mean = sum(balance_loss(of, routes[at], k, sum(each[one] for one in step[: n + 1]))
                       for n, at in enumerate(step)) / len(step)
            assert found[figure] == pytest.approx(float(mean) / len(load), rel=1e-5), figure
            whole = whole + coeff * mean
        gradients = torch.autograd.grad(whole, list(model.parameters()), retain_graph=True)
        assert found["grad_norm"] == pytest.approx(
            float(torch.stack([one.norm() for one in gradients]).norm()), rel=1e-5)


def test_a_full_expert_drops_the_tokens_of_the_smallest_weights(case_of_experts, runs):
    """Of a microbatch, of which padding takes no place: as transformers does without them."""
    model, microbatches = case_of_experts
    dropped, total, trained = 0, 0.0, 0

    def drop(_, __, given):
        """Of what the router gives of tokens [T]: logits, weights [T, k], experts [T, k]."""
        nonlocal dropped
        logits, weight_Tk, expert_Tk = given
        whole_TE = torch.zeros_like(logits).scatter(1, expert_Tk, weight_Tk) * real_T[:, None]
        capacity = math.ceil(int(real_T.sum()) * expert_Tk.shape[1] / logits.shape[1])
        least_E = whole_TE.topk(capacity, dim=0).values[-1]
        kept_TE = whole_TE >= least_E.clamp(min=1e-9)
        dropped += int((whole_TE > 0).sum() - kept_TE.sum())
        return logits, weight_Tk * kept_TE.gather(1, expert_Tk), expert_Tk

    hooks = [layer.mlp.gate.register_forward_hook(drop) for layer in model.model.layers]
    for group in (microbatches[at] for at in TRAINED[0]):
        tokens, labels = (
            torch.nn.utils.rnn.pad_sequence(
                [getattr(one, name) for one in group], batch_first=True, padding_value=fill)
            for name, fill in (("tokens", 0), ("labels", IGNORE)))
        mask = torch.arange(tokens.shape[1]) < torch.tensor([[one.num_tokens] for one in group])
        real_T = mask.flatten()
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask.long()).logits
        total += float(torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"))
        trained += int((labels != IGNORE).sum())
    for hook in hooks:
        hook.remove()
    first, _ = lines(runs["cpu"], "experts, ep2, some full", "train")
    assert first["dropped_tokens"] == dropped > 0
    assert first["routed_tokens"] == 2 * 4 * sum(
        one.num_tokens for at in TRAINED[0] for one in microbatches[at])
    assert first["loss"] == pytest.approx(total / trained, rel=1e-6)
