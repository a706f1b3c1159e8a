"""A traced rank holds what the same rank holds in a run, and what the formulas say of it."""

from __future__ import annotations

import gc
import json
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from true_sizes import SIZES, counted, write

from megatron_vl.cli.main import run
from megatron_vl.parallel import Layout, communicators
from megatron_vl.planner.microbatch import Microbatch
from megatron_vl.training.activations import activation_memory
from megatron_vl.training.memory import rank_memory
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.plan import plan_run
from megatron_vl.training.trace.allocated import AllocatedBytes
from megatron_vl.training.trace.rank import measure, trace_rank
from megatron_vl.training.trace.row import full_batch

HOST_BYTES = 16 * 1024  # places, lengths and positions, which on a CPU lie beside the device's
TP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
TP4 = dict(tensor_model_parallel_size=4, sequence_parallel=True)  # of two groups
PP = dict(pipeline_model_parallel_size=2)
PP4 = dict(pipeline_model_parallel_size=4)
VP = dict(**PP, num_virtual_stages_per_pipeline_rank=2)
CP = dict(context_parallel_size=2)
ROWS = dict(micro_batch_size=2)
SELECTIVE = dict(recompute_granularity="selective")
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
BLOCK = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)
LORA = dict(lora_rank=4)
EVERY_PART = dict(lora_target=["llm", "vit", "merger"])
FP32 = dict(bf16=False)
CHUNKS = dict(cross_entropy_chunks=4)
TOWER_OVER_STAGES = dict(vit_pp_layers="1,1", pp_layers="0,4")
FROZEN_TOWER = dict(freeze_vit=True)
EP = dict(expert_model_parallel_size=2)
WHOLE = dict(expert_model_parallel_size=4, expert_tensor_parallel_size=1)  # an expert a rank
GROUPED = dict(moe_grouped_gemm="on")
TEXT, IMAGES, WINDOWS = "text_model_dir", "model_dir", "window_model_dir"
EXPERTS = "experts_model_dir"


def plan_of(hf_dir, world: int = 1, **options):
    return plan_run(TrainConfig.from_dict(dict(
        hf_config=str(hf_dir), train_data_path="DATA", bf16=True, use_distributed_optimizer=True,
        seq_length=512, global_batch_size=8,
    ) | options), world, here=False)


def measured(plan):
    """A real run's first rank, of one, in this process."""
    from megatron_vl.platform import initialize, leave_layout

    found = measure(plan, 0, initialize(plan.layout))
    leave_layout()
    return found


def left_over(plan, rank: int) -> int:
    """Bytes that a traced rank's microbatches leave behind."""
    from megatron_vl.training.trace import allocated

    left = []

    class Leaving(AllocatedBytes):
        def __exit__(self, *error):
            gc.collect()
            left.append(self.now)
            return super().__exit__(*error)

    allocated.AllocatedBytes = Leaving
    try:
        trace_rank(plan, rank)
    finally:
        allocated.AllocatedBytes = AllocatedBytes
    return left[0]


@pytest.fixture(scope="module")
def process():
    """Makes a process that does one thing after another; a platform is for the life of one."""
    pools = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(2)]
    yield dict(zip(("traced", "real"), pools, strict=True))
    for pool in pools:
        pool.shutdown()


def test_what_is_emptied_and_filled_again_counts_as_long_as_it_is_there():
    with AllocatedBytes([]) as counted:
        first = torch.empty(1000)
        first.untyped_storage().resize_(0)
        second = torch.empty(2000)
        assert counted.peak == second.nbytes
        first.untyped_storage().resize_(4000)
        first.add_(1)
    assert counted.peak == first.nbytes + second.nbytes


@pytest.mark.parametrize(("model", "options"), [
    (TEXT, {}),
    (TEXT, LORA | SELECTIVE | dict(quantize_base="nf4")),
    (IMAGES, FULL | dict(cross_entropy_chunks=4)),
    (WINDOWS, dict(fp16=True, bf16=False)),
    (EXPERTS, SELECTIVE | CHUNKS | dict(moe_grouped_gemm="off")),
    (EXPERTS, FULL | GROUPED | dict(moe_expert_capacity_factor=100.0)),
], ids=str)
def test_a_traced_rank_holds_what_a_real_one_does(process, model, options, request):
    plan = plan_of(request.getfixturevalue(model), **options)
    traced = process["traced"].submit(trace_rank, plan, 0)
    real, traced = process["real"].submit(measured, plan).result(), traced.result()
    for kind in ("weight_bytes", "gradient_bytes", "optimizer_bytes"):
        assert getattr(traced, kind) == getattr(real, kind), kind
    assert 0 <= real.activation_bytes - traced.activation_bytes < HOST_BYTES


@pytest.mark.parametrize(("model", "world", "rank", "options"), [
    (TEXT, 1, 0, {}),
    (TEXT, 1, 0, FP32),
    (TEXT, 1, 0, CHUNKS),
    (TEXT, 1, 0, SELECTIVE),
    (TEXT, 1, 0, FULL | dict(recompute_num_layers=2)),
    (TEXT, 1, 0, BLOCK),
    (TEXT, 1, 0, FULL | dict(seq_length=32)),  # a row that takes less than tied embeddings
    (TEXT, 1, 0, ROWS),
    (TEXT, 1, 0, LORA | FULL),
    (TEXT, 1, 0, LORA | dict(quantize_base="nf4")),
    (TEXT, 2, 1, TP),
    (TEXT, 2, 0, FULL | TP),
    (TEXT, 2, 1, CP),
    (TEXT, 2, 0, PP | SELECTIVE),
    (TEXT, 2, 0, PP | FULL),
    (TEXT, 2, 1, PP | dict(packing_buffer_size=0)),
    (TEXT, 2, 0, VP),
    (TEXT, 2, 1, VP),
    (TEXT, 2, 1, VP | FULL | CHUNKS),
    (TEXT, 2, 0, VP | FULL | dict(global_batch_size=2)),
    (TEXT, 4, 0, TP | PP | dict(pp_layers="1,3")),
    (TEXT, 4, 3, TP | PP | dict(pp_layers="1,3")),
    (TEXT, 4, 0, PP4),
    (TEXT, 4, 1, PP4),
    (TEXT, 4, 2, PP4),
    (TEXT, 8, 5, LORA),
    (IMAGES, 1, 0, FULL),
    (IMAGES, 1, 0, LORA | FULL),
    (IMAGES, 2, 0, TP),
    (IMAGES, 2, 0, TP | dict(vit_data_parallel=True)),
    (IMAGES, 2, 0, PP),
    (IMAGES, 2, 1, CP),
    (IMAGES, 2, 0, PP | TOWER_OVER_STAGES),
    (IMAGES, 2, 1, PP | TOWER_OVER_STAGES),
    (WINDOWS, 1, 0, {}),
    (WINDOWS, 2, 0, TP),
    ("deepstack_model_dir", 2, 0, PP),
    ("qk_norm_model_dir", 2, 0, TP),
    ("baichuan_model_dir", 2, 0, TP),
    ("resampler_model_dir", 1, 0, {}),
    ("resampler_model_dir", 2, 0, TP),
    ("resampler_model_dir", 2, 0, PP | SELECTIVE),
    ("qk_norm_model_dir", 2, 0, PP | SELECTIVE),
    (TEXT, 4, 1, PP4 | SELECTIVE),
    (EXPERTS, 1, 0, CHUNKS),
    (EXPERTS, 1, 0, CHUNKS | dict(moe_expert_capacity_factor=0.5)),
    (EXPERTS, 1, 0, CHUNKS | GROUPED | SELECTIVE),
    (EXPERTS, 1, 0, LORA | FULL | dict(quantize_base="nf4")),
    (EXPERTS, 2, 1, EP | FULL | CHUNKS),
    (EXPERTS, 2, 0, EP | FULL | CHUNKS | GROUPED),
    (EXPERTS, 4, 3, WHOLE | FULL),
    (EXPERTS, 8, 1, TP | WHOLE | SELECTIVE | CHUNKS),
    (EXPERTS, 2, 0, TP | CHUNKS),
    (EXPERTS, 4, 2, TP | EP | FULL),
    (EXPERTS, 4, 0, PP | EP),
    (EXPERTS, 4, 1, PP4 | SELECTIVE),
    ("deepstack_experts_model_dir", 2, 0, PP),
    (TEXT, 1, 0, FP32 | SELECTIVE | CHUNKS),
    (TEXT, 4, 1, PP4 | FP32),
    (WINDOWS, 1, 0, FP32 | SELECTIVE),
    ("deepstack_model_dir", 1, 0, FP32),
    ("resampler_model_dir", 1, 0, FP32 | SELECTIVE),
    (IMAGES, 1, 0, LORA | CHUNKS | FULL),
    (IMAGES, 2, 0, LORA | CHUNKS | CP),
    (IMAGES, 1, 0, LORA | CHUNKS | EVERY_PART),
    (WINDOWS, 1, 0, SELECTIVE | CHUNKS),
    (WINDOWS, 2, 0, PP | TOWER_OVER_STAGES | SELECTIVE),
    ("deepstack_model_dir", 4, 1, PP4 | FULL),
    ("deepstack_model_dir", 4, 2, PP4 | SELECTIVE),
    ("deepstack_model_dir", 2, 0, VP | FULL),
    ("deepstack_model_dir", 2, 1, VP | FULL),
    (TEXT, 4, 2, PP4 | LORA | SELECTIVE),
    (TEXT, 4, 1, PP4 | FULL),
    ("narrow_model_dir", 4, 2, PP4),
    ("narrow_model_dir", 4, 2, PP4 | FULL),
    ("deepstack_model_dir", 4, 2, PP4),
    (EXPERTS, 4, 2, PP4 | FULL),
    (EXPERTS, 2, 0, CP | FULL | CHUNKS),
    ("baichuan_model_dir", 2, 0, CP),
    (TEXT, 2, 1, VP | dict(lora_rank=32)),
    (TEXT, 4, 1, TP4),
    (TEXT, 4, 1, TP4 | SELECTIVE),
    (TEXT, 4, 1, TP4 | ROWS),  # laid end to end, which copies
    (EXPERTS, 4, 0, TP4 | ROWS),
    ("baichuan_model_dir", 1, 0, ROWS),
    (TEXT, 4, 0, TP | CP),
    ("qk_norm_model_dir", 4, 3, TP4 | FP32),
    (IMAGES, 1, 0, FROZEN_TOWER),
    (WINDOWS, 2, 0, FROZEN_TOWER | TP),
    (WINDOWS, 1, 0, LORA | EVERY_PART),
    ("deepstack_model_dir", 1, 0, FROZEN_TOWER),
    ("resampler_model_dir", 1, 0, LORA | EVERY_PART),
    ("resampler_model_dir", 1, 0, LORA | FULL | dict(lora_target=["merger"])),
    ("resampler_model_dir", 1, 0, FROZEN_TOWER | FULL),
    (TEXT, 2, 1, TP | LORA | dict(lora_dropout=0.1)),
], ids=str)
def test_formulas_and_trace_agree(process, model, world, rank, options, request):
    plan = plan_of(request.getfixturevalue(model), world, **options)
    traced = process["traced"].submit(trace_rank, plan, rank).result()
    held = rank_memory(plan, traced.stage)
    assert traced.gradient_bytes == held.gradient_bytes
    # Of an adapter there is a scale beside every row of a second factor.
    scales = 0.06 * ("lora_rank" in options)
    counts = 4 * 80 * ("experts" in model)  # of a router, in every layer
    assert traced.weight_bytes == pytest.approx(held.weight_bytes, rel=scales, abs=counts)
    # Gaps between weights are in no rank's share.
    assert traced.optimizer_bytes == pytest.approx(held.optimizer_bytes, rel=0.005)
    predicted = activation_memory(plan, traced.stage, held=held).peak
    assert predicted == pytest.approx(traced.activation_bytes, rel=0.03)


@pytest.mark.parametrize(("family", "size", "world", "rank", "options"), [
    # The most is there with the gradient of the embedding, and of the logits' weight.
    ("qwen3_vl", "8B", 2, 0, PP | FULL),
    ("qwen2_5_vl", "3B", 8, 7, FULL | FROZEN_TOWER | dict(
        tensor_model_parallel_size=8, sequence_parallel=True, vit_data_parallel=True,
        seq_length=2048, cross_entropy_chunks=2)),
    # The most is there with the gradient of a weight and what sequence parallelism gathered.
    ("qwen2_vl", "72B", 16, 13, TP | FULL | dict(
        pipeline_model_parallel_size=8, seq_length=4096)),
    # .. of the first linear layer, and with that of its input.
    ("qwen2_5_vl", "32B", 16, 4, TP4 | PP4 | FULL),
    # .. in the forward that is run again, at experts' second product.
    ("qwen3_vl_moe", "30B-A3B", 8, 0, LORA | FULL | CHUNKS | dict(
        expert_model_parallel_size=8, expert_tensor_parallel_size=1, seq_length=1024)),
    # A normalised weight's gradient is made when what was gathered is gone.
    ("baichuan", "7B", 4, 1, TP4 | FULL | CHUNKS | dict(seq_length=4096)),
    # The first of eight ranks has an image of seven.
    ("qwen", "7B", 8, 0, TP4 | CP | dict(vit_data_parallel=True, seq_length=2048)),
], ids=str)
def test_formulas_and_trace_agree_at_published_sizes(
    process, tmp_path, family, size, world, rank, options, request
):
    if family in SIZES:
        write(tmp_path, size, family)
    else:
        tiny = {"qwen": "resampler_model_dir", "baichuan": "baichuan_model_dir"}[family]
        config = counted(request.getfixturevalue(tiny), family, size)
        (tmp_path / "config.json").write_text(json.dumps(config))
    plan = plan_of(tmp_path, world, **options)
    traced = process["traced"].submit(trace_rank, plan, rank).result()
    predicted = activation_memory(plan, traced.stage).peak
    assert predicted == pytest.approx(traced.activation_bytes, rel=0.01)


@pytest.mark.parametrize(("model", "world", "rank", "options"), [
    (TEXT, 2, 1, VP),
    (TEXT, 2, 1, PP | LORA | FULL),
    (TEXT, 2, 0, TP | SELECTIVE | CHUNKS),
    (IMAGES, 2, 1, PP | TOWER_OVER_STAGES),
    (IMAGES, 2, 1, PP | TOWER_OVER_STAGES | FROZEN_TOWER),
    (IMAGES, 2, 0, CP | LORA | EVERY_PART),
    (WINDOWS, 2, 0, TP | dict(vit_data_parallel=True)),
    ("deepstack_model_dir", 2, 1, VP | FULL),
    ("deepstack_model_dir", 2, 0, VP),
    ("resampler_model_dir", 2, 0, PP),
    ("baichuan_model_dir", 2, 1, PP),
    (EXPERTS, 4, 3, VP | EP),
    (EXPERTS, 4, 0, TP | EP | FULL | dict(expert_tensor_parallel_size=1)),
], ids=str)
def test_nothing_of_a_microbatch_is_held_after_the_step(
    process, model, world, rank, options, request
):
    plan = plan_of(request.getfixturevalue(model), world, **options)
    # Tables that are made once stay, and the buffer of what sequence parallelism gathers.
    states = plan.row_length * plan.spec.decoder.hidden_size * 2
    left = process["traced"].submit(left_over, plan, rank).result()
    assert 0 <= left - states * ("sequence_parallel" in options) < HOST_BYTES + 1024 < states / 2


def counted_products(plan) -> float:
    """FLOPs of a microbatch's products of matrices, by torch; not of attention, which it knows on a
    CPU from 2.15 on, and counts as if no mask were."""
    with FlopCounterMode(display=False) as counter:
        trace_rank(plan, 0)
    products = sum(flops for operator, flops in counter.get_flop_counts()["Global"].items()
                   if "scaled_dot_product" not in str(operator))
    return products / 2  # one more microbatch than stages


@pytest.mark.parametrize("model", [TEXT, IMAGES, EXPERTS, "deepstack_model_dir"])
def test_the_operations_of_a_step_are_those_that_torch_counts(process, model, request):
    # Of experts in one product torch counts nothing.
    one_by_one = dict(moe_grouped_gemm="off") if model == EXPERTS else {}
    plan = plan_of(request.getfixturevalue(model), **one_by_one)
    counted = process["traced"].submit(counted_products, plan).result()
    row = full_batch(plan, None)
    grids, vision = Counter(map(tuple, row.grid_thw.tolist())), plan.spec.vision
    batch = Microbatch.of(plan, lengths=row.cu_seqlens.diff().tolist(), images=grids,
                          trained=plan.row_length)
    products = batch.needed - 3 * (batch.attention + batch.vision_attention)
    if vision is not None:  # pixels have no gradient
        products -= 2 * batch.patches * vision.patch_dim * vision.hidden_size
    assert counted == pytest.approx(products, rel=2e-3)


@pytest.mark.parametrize(("model", "words", "told"), [
    (TEXT, ["--trace", 2], "--trace has rank 2, but this run has ranks 0 to 1; leave it out."),
], ids=str)
def test_what_cannot_be_traced_is_refused_by_name(model, words, told, request, capsys):
    hf_dir = request.getfixturevalue(model)
    given = ["train", "--dry-run", "--hf-config", hf_dir, "--train-data-path", "DATA",
             "--nproc-per-node", 2, "--global-batch-size", 2, *words]
    assert run(list(map(str, given))) == 2
    assert told in capsys.readouterr().err


def test_a_plan_shows_traced_beside_predicted_bytes(experts_model_dir, capsys):
    given = ["plan", experts_model_dir, "--gpus", 2, "--seq-length", 512, "--trace"]
    assert run(list(map(str, given))) == 0
    out = capsys.readouterr().out
    assert "traced, GiB" in out and "\nrank 0 " in out


GROUPS = [dict(tp=2, pp=2, dp=2), dict(pp=3), dict(dp=4, ep=2),
          dict(tp=2, pp=2, cp=2, dp=2, ep=4, etp=1)]


def groups_of(layout: Layout, rank: int, embedding_stage: int) -> int:
    """Megatron-Core's groups of a rank, that have other ranks and send on the device."""
    from torch.distributed import distributed_c10d

    from megatron_vl.platform import initialize
    from megatron_vl.platform.meta import become

    become(rank, layout.world_size)
    initialize(layout, embedding_stage=embedding_stage)
    names = [group.group_desc for group in distributed_c10d._world.pg_map
             if group.size() > 1 and not group.group_desc.endswith("GLOO")]
    experts = "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP"  # of which Megatron-Core 0.19 makes two
    return len(names) + (experts in names and f"{experts}_WITH_EGTP" not in names)


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_the_communicators_that_are_told_are_megatron_cores_groups(sizes, process):
    layout = Layout(**sizes)
    for rank, embedding_stage in ((0, 0), (0, layout.pp - 1), (layout.world_size - 1, 0)):
        found = process["traced"].submit(groups_of, layout, rank, embedding_stage).result()
        assert found == communicators(layout, stage=layout.coordinates(rank).pp,
                                      embedding_stage=embedding_stage)
