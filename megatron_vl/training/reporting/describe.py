"""What is about to run, in a few lines."""

from __future__ import annotations

from collections import Counter

import torch

from megatron_vl.models.common.layer_spec import use_transformer_engine
from megatron_vl.models.common.parts import PARTS, part_of
from megatron_vl.models.registry import family
from megatron_vl.ops.attention import choose_backend
from megatron_vl.ops.fusion import choose_kernel
from megatron_vl.parallel import LANGUAGE
from megatron_vl.training.plan import Plan
from megatron_vl.training.setup import fuses


def describe(plan: Plan, platform) -> str:
    """What is about to run, in a few lines."""
    config, spec = plan.config, plan.spec
    rows = config.batch.global_batch_size
    return (
        (f"{platform.notice}\n" if platform.notice else "")
        + f"{spec.model_type} on {platform.name}, {plan.layout}: {plan.split}\n"
        f"{rows} rows of {plan.described_length} a step = {plan.num_microbatches} "
        f"microbatches x {config.batch.micro_batch_size} rows x {plan.layout.dp} data ranks; "
        f"{_steps(plan)}; {plan.precision}"
        f"{', deterministic' if torch.are_deterministic_algorithms_enabled() else ''}\n"
        f"{describe_parts(plan)}\n{describe_attention(plan)}\n{describe_kernels(plan, platform)}"
        + (f"\n{plan.described_experts}" if plan.described_experts else "")
        + ("" if not platform.in_host_memory or not config.optimizer.optimizer_cpu_offload else
           "\noptimizer-cpu-offload changes nothing here: the optimizer is in host memory anyway")
    )


def _steps(plan: Plan) -> str:
    batch = plan.config.batch
    epochs = batch.num_train_epochs
    if epochs is None:
        return f"{batch.train_iters} steps"
    read = f"{epochs:g} epoch{'s' if epochs != 1 else ''}"
    if plan.config.data.packs:  # how many samples share a row is not known yet
        return f"{read}, about {batch.train_iters} steps by a forecast of the packed rows"
    return f"{read}, {batch.train_iters} steps"


def describe_parts(plan: Plan) -> str:
    """Parameters of every part of the whole model, and what becomes of them."""
    run, options = plan.config.model, plan.config.optimizer
    weights = family(plan.spec.model_type).weight_map(plan.spec)
    constants = frozenset() if run.train_constants else weights.constants
    counts, constant = Counter(), 0
    for name, count in weights.counts().items():
        if name in constants:
            constant += count
        else:
            counts[part_of(name)] += count
    frozen, added = plan.trainable.frozen, plan.trainable.adapter_numbers
    trained = sum(counts[part] for part in PARTS if part not in frozen) + sum(added.values())

    def rate(part: str) -> str:
        return f"at lr {options.lr * options.lr_ratio(part):.3e}"

    form = plan.trainable.quantize_base
    kept = {LANGUAGE: f" (linear weights of its layers in {form})"} if form is not None else {}
    told = [f"{title} {counts[part]:,} "
            + (f"frozen{kept.get(part, '')}" if part in frozen else rate(part))
            for part, title in PARTS.items() if counts[part]]
    told += [f"an adapter of the {PARTS[part]} {number:,} {rate(part)}"
             for part, number in added.items()]
    told += [f"constant {constant:,} (train-constants trains them)"] if constant else []
    whole = counts.total() + constant + sum(added.values())
    cut = plan.trainable.cut_within_blocks(plan.layout)
    return (f"{trained:,} of {whole:,} parameters are trained: {', '.join(told)}"
            + (f"\nquantize-base: {cut}" if cut else ""))


def describe_kernels(plan: Plan, platform) -> str:
    """Who computes the other operations on this rank."""
    fused = fuses(plan, platform)
    vision = plan.spec.vision
    names = ["rotary", "swiglu", "cross_entropy"]
    names += [vision.activation] if vision is not None and not vision.gated else []
    chosen = [f"{name} {choose_kernel(name, fused).name}" for name in names]
    chosen += [f"experts {way}"] if (way := plan.experts_way()) is not None else []
    norms = ("transformer-engine" if use_transformer_engine()
             else choose_kernel("rms_norm", fused).name)
    when = "in" if fused and platform.runs_cuda else "after"
    return (f"operations: {', '.join(chosen)}, norms {norms}; "
            f"weight gradient added {when} its product")


def describe_attention(plan: Plan) -> str:
    """The attention backend of each tower on this rank, and why."""
    run = plan.config.model
    language, *vision = (
        str(choose_backend(
            run.attention_backend, dtype=run.dtype, head_dim=tower.head_dim,
            deterministic=run.deterministic,
        ))
        for tower in reversed(plan.spec.towers)
    )
    return f"attention: {language}" + "".join(
        f"\nattention of the vision tower: {other}" for other in vision if other != language
    )
