"""What `train --dry-run` says a rank holds is what its tensors take after a step."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from commands import ROOT, run

from megatron_vl.training.memory import copies, rank_memory
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.plan import plan_run

RUN = {
    "seq_length": 128, "micro_batch_size": 2, "global_batch_size": 8, "train_iters": 1, "lr": 1e-3,
    "min_lr": 1e-4, "eval_interval": 0, "num_workers": 0, "save_interval": 10,
    "packing_buffer_size": 0, "use_distributed_optimizer": False,
}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}  # of a model with experts
DISTRIBUTED = {"use_distributed_optimizer": True}
LAYOUTS = {  # on two ranks
    "dp2": {},
    "dp2 bf16": {"bf16": True},
    "dp2 distributed": DISTRIBUTED,
    "dp2 distributed bf16": DISTRIBUTED | {"bf16": True},
    "dp2 distributed bf16, reduced in bf16": DISTRIBUTED | {
        "bf16": True, "grad_reduce_in_bf16": True},
    "dp2 distributed fp16, overlapped": DISTRIBUTED | {
        "fp16": True, "initial_loss_scale": 64.0, "overlap_grad_reduce": True,
        "overlap_param_gather": True},
    "cp2 distributed": DISTRIBUTED | {"context_parallel_size": 2},
    "tp2": TP2,
    "tp2 bf16, whole towers": TP2 | {"bf16": True, "vit_data_parallel": True},
    "pp2 uneven": PP2 | {"decoder_first_pipeline_num_layers": 1},
    "pp2 distributed bf16": PP2 | DISTRIBUTED | {"bf16": True},
    "vp2 distributed": PP2 | DISTRIBUTED | {"num_virtual_stages_per_pipeline_rank": 2},
    "ep2 bf16": EP2 | {"bf16": True},
    "ep2 distributed": EP2 | DISTRIBUTED,
    "tp2 ep2 distributed bf16, whole experts": EP2 | TP2 | DISTRIBUTED | {
        "bf16": True, "sequence_parallel": True, "expert_tensor_parallel_size": 1},
    "frozen tower": {"freeze_vit": True, "bf16": True},
    "frozen language model, distributed": DISTRIBUTED | {"freeze_llm": True},
    "frozen language model, pp2": PP2 | {"freeze_llm": True},
}


@pytest.fixture(scope="module", params=["untied", "tied"])
def measured(request, model_dir, wds_dir, experts_model_dir, text_wds_dir, shared):
    """(plans, bytes of every rank) by layout."""
    out = shared.root / f"memory {request.param}"
    jobs = {
        name: {**RUN, **options, **(
            {"hf_config": str(experts_model_dir), "train_data_path": str(text_wds_dir)}
            if options.keys() >= EP2.keys() else
            {"hf_config": str(out / "model"), "train_data_path": str(wds_dir)})}
        for name, options in LAYOUTS.items()
    }

    def measure(out: Path) -> None:
        config = json.loads((model_dir / "config.json").read_text())
        config["tie_word_embeddings"] = request.param == "tied"
        config["vocab_size"] += 1  # TP does not divide it
        shutil.copytree(model_dir, out / "model", ignore=shutil.ignore_patterns("*.safetensors"))
        (out / "model" / "config.json").write_text(json.dumps(config))
        (out / "jobs.json").write_text(json.dumps(jobs))
        done = run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", 2, ROOT / "tests/distributed/training_jobs.py", out])
        assert done.code == 0, done.text

    shared.made(out.name, measure)
    return {
        name: (plan_run(TrainConfig.from_dict(options), 2),
               [json.loads((out / f"{name}.{rank}.json").read_text())["bytes"] for rank in (0, 1)])
        for name, options in jobs.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_holds_what_was_said(measured, name):
    plan, found = measured[name]
    for rank, held in enumerate(found):
        said = rank_memory(plan, plan.layout.coordinates(rank).pp)
        assert held["weights"] == said.weight_bytes
        assert held["gradients"] == said.gradient_bytes
        if plan.config.optimizer.use_distributed_optimizer:
            # Padding lies in the shares of the last ranks, and has no state.
            assert held["optimizer"] <= said.optimizer_bytes
        else:
            assert held["optimizer"] == said.optimizer_bytes
    if plan.config.optimizer.use_distributed_optimizer:
        each = 8 + 4 * (plan.config.model.dtype != "float32")
        layout, alone = plan.layout, plan.layout.pp > 1
        for stage in range(layout.pp):
            ranks = [found[stage]] if alone else found
            trained = sum(
                one.numel * len(ranks) // (
                    layout.expert_dp if "{e}" in one.name else layout.dp * layout.cp)
                for chunk in rank_memory(plan, stage).chunks for one in chunk.held if one.trained
            )
            assert sum(one["optimizer"] for one in ranks) == each * trained


def test_what_ranks_hold_beyond_the_model_is_accounted_for(measured):
    for plan, _ in measured.values():
        held = sum(rank_memory(plan, stage).weights for stage in range(plan.layout.pp))
        assert held * len(plan.layout.shards) == copies(plan).total
