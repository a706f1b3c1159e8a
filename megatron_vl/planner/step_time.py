"""Seconds of a step: products, elementwise operations and collectives, stage by stage; no torch.

Nothing here is measured where the run will be. FLOPs are those of the model's spec, rates those of
a `Card`. A chunk takes as long as its device or, if that is longer, as Python needs to queue its
operations; where Python does not run ahead of the device, as long as both.

Letters: T tokens and P patches of a microbatch, over all ranks that share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_vl.models.common.parts import MERGER
from megatron_vl.parallel import LANGUAGE, VISION
from megatron_vl.planner.cards import Card
from megatron_vl.planner.links import Links
from megatron_vl.planner.microbatch import Microbatch
from megatron_vl.planner.schedule import Pipeline, simulate
from megatron_vl.planner.work import Work
from megatron_vl.training.memory import FP32, RankMemory, rank_memory
from megatron_vl.training.plan import Plan

# Operations that a layer launches, forward and backward: those of Megatron-Core's local layers on
# one TP rank that make a tensor, counted without views. Fused kernels are fewer.
LANGUAGE_OPERATIONS, EXPERTS_OPERATIONS, VISION_OPERATIONS = (39, 73), (97, 161), (30, 54)
END_OPERATIONS = (74, 33)  # of a microbatch beside its layers: embedding, logits, losses
STEP_PASSES = 3  # over the optimizer's state: read, written; gradients read for norm and update


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the chunks of a layout are made of."""

    layer: Work  # of the language model
    vision_layer: Work
    start: Work  # beside layers, where the word embedding is: merger and gathered embeddings
    end: Work  # on the last chunk: logits and losses


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Where a step's time goes."""

    pipeline: Pipeline
    seconds: float  # of the step, to the last stage's updated weights
    ends: tuple[float, ...]  # of every stage, its update included
    parts: tuple[Parts, ...]  # of microbatches, which come in turn
    works: tuple[Sequence[Sequence[Work]], ...]  # of the same, [chunk][stage]
    flops: float  # that the step needs, over all ranks

    def utilization(self, plan: Plan, card: Card) -> float:
        """MFU: against the peak of the card's data sheet."""
        return self.flops / (self.seconds * plan.layout.world_size * card.peak_tflops * 1e12)


def parts(plan: Plan, card: Card, batch: Microbatch, *, per_node: int, chunks: int) -> Parts:
    """What layers and ends take on one rank, whatever the split is; `chunks` of cross-entropy."""
    links = Links(plan, card, per_node)
    merger = _merger(plan, card, batch) if batch.patches else Work()
    return Parts(
        layer=_language_layer(plan, card, batch, links),
        vision_layer=_vision_layer(plan, card, batch, links) if batch.patches else Work(),
        start=merger + links.gathered_embeddings(batch),
        end=_head(plan, card, batch, chunks),
    )


def chunk_work(plan: Plan, of: Parts, card: Card) -> list[list[Work]]:
    """Of one microbatch, [chunk][stage]."""
    split, layout = plan.split, plan.layout
    rows = []
    for chunk in range(layout.vp):
        row = []
        for stage in range(layout.pp):
            layers = len(split.layers(LANGUAGE, stage, chunk))
            vision = len(split.layers(VISION, stage, chunk)) if VISION in split.towers else 0
            work = of.layer.times(layers) + of.vision_layer.times(vision)
            work += of.start if (stage, chunk) == split.embedding_chunk else Work()
            work += of.end if (stage, chunk) == (layout.pp - 1, layout.vp - 1) else Work()
            row.append(work.together(runs_ahead=card.host_runs_ahead))
        rows.append(row)
    return rows


def step_time(
    plan: Plan, of: Sequence[Parts], stages: Sequence[RankMemory], card: Card,
    batches: Sequence[Microbatch], *, per_node: int,
) -> StepTime:
    """A step on ranks that hold `stages`.

    Args:
        of: the parts of `batches`, which come in turn where a step has more.
    """
    links, options = Links(plan, card, per_node), plan.config.optimizer
    works = [chunk_work(plan, one, card) for one in of]
    pipeline = simulate(
        [[[one.forward for one in row] for row in work] for work in works],
        [[[one.backward for one in row] for row in work] for work in works],
        microbatches=plan.num_microbatches, transfer=max(map(links.transfer, batches)),
    )
    ends = []
    for stage, held in enumerate(stages):
        reduced, gathered = links.shared(held)
        if options.overlap_grad_reduce:
            reduced -= sum(row[stage].backward for row in works[-1])
        if options.overlap_param_gather:
            gathered -= sum(row[stage].forward for row in works[0])
        update = card.memory_seconds(STEP_PASSES * held.optimizer_bytes + held.gradient_bytes)
        update += card.host_memory_seconds(STEP_PASSES * held.host_bytes)
        ends.append(pipeline.ends[stage] + max(0.0, reduced) + links.tied(held) + update
                    + max(0.0, gathered))
    return StepTime(pipeline=pipeline, seconds=max(ends), ends=tuple(ends), parts=tuple(of),
                    works=tuple(works), flops=needed_flops(plan, batches))


def needed_flops(plan: Plan, batches: Sequence[Microbatch]) -> float:
    """Of a step over all ranks, whose microbatches are these in turn."""
    needed = sum(one.needed for one in batches) / len(batches)
    return needed * plan.num_microbatches * plan.layout.dp


def predict(
    plan: Plan, card: Card, batches: Sequence[Microbatch], *, per_node: int, chunks: int = 1
) -> StepTime:
    """A step of these microbatches, in turn; `chunks` of cross-entropy."""
    of = [parts(plan, card, one, per_node=per_node, chunks=chunks) for one in batches]
    stages = [rank_memory(plan, stage) for stage in range(plan.layout.pp)]
    return step_time(plan, of, stages, card, batches, per_node=per_node)


# ---- computation -------------------------------------------------------------------------------


def _again(work: Work, elementwise: float, granularity: str) -> Work:
    """The same with what recompute adds to backward."""
    more = {"none": 0.0, "selective": elementwise, "full": work.forward}[granularity]
    host = work.forward_host if granularity == "full" else 0.0
    return replace(work, backward=work.backward + more, backward_host=work.backward_host + host)


def _language_layer(plan: Plan, card: Card, batch: Microbatch, links: Links) -> Work:
    decoder, layout, experts = plan.spec.decoder, plan.layout, plan.spec.decoder.experts
    ranks, number = layout.tp * layout.cp, decoder.num_layers
    attention = batch.attention / number / ranks
    matrices = batch.matrices / number / ranks
    factors = 2 * plan.trainable.adapter_numbers.get(LANGUAGE, 0) * batch.tokens / number / ranks
    trained = LANGUAGE not in plan.trainable.frozen
    heads = 2 * (decoder.num_attention_heads + decoder.num_query_groups) * decoder.head_dim
    weights = decoder.hidden_size * (heads + 3 * decoder.ffn_hidden_size) / layout.tp
    inner, products, operations = decoder.ffn_hidden_size, 4, LANGUAGE_OPERATIONS
    if experts is not None:
        inner = experts.per_token * experts.ffn_hidden_size
        local = experts.count / layout.ep
        products, operations = 2 + 2 * local, EXPERTS_OPERATIONS
        weights = decoder.hidden_size * (
            heads / layout.tp + 3 * local * experts.ffn_hidden_size / layout.expert_tp)
    # Read and written: two norms, two sums with the residual; q, k and their rotation; SwiGLU.
    stream = 10 * decoder.hidden_size / layout.row_parts
    inside = (4 * decoder.num_attention_heads * decoder.head_dim + 3 * inner) / ranks
    elementwise = card.memory_seconds(
        batch.tokens * (stream + inside) * links.itemsize, operations=operations[0])
    # A weight's gradient is added to the fp32 buffer, which is read and written.
    added = card.memory_seconds(2 * FP32 * weights * trained, operations=products)
    sent = links.language_layer(batch)

    def attended(backward: bool) -> float:
        return card.attention_seconds(attention * (1 + backward), length=batch.mean_length,
                                      backward=backward)

    work = Work(
        forward=card.matrix_seconds(matrices + factors, products=products) + attended(False)
        + elementwise + sent.forward,
        backward=card.matrix_seconds(matrices * (1 + trained) + 2 * factors,
                                     products=products * (1 + trained))
        + attended(True) + 2 * elementwise + added + sent.backward,
        forward_host=card.host_seconds(operations[0]),
        backward_host=card.host_seconds(operations[1]),
    )
    return _again(work, elementwise, plan.recompute.granularity)


def _vision_layer(plan: Plan, card: Card, batch: Microbatch, links: Links) -> Work:
    vision, layout = plan.spec.vision, plan.layout
    ranks = layout.tp * layout.cp  # cut over TP, or images divided over it
    attention = batch.vision_attention / vision.depth / ranks
    matrices = batch.vision_matrices / vision.depth / ranks
    factors = 2 * plan.trainable.adapter_numbers.get(VISION, 0) * batch.patches
    factors = factors / vision.depth / ranks
    trained, reached = (VISION not in what for what in (plan.trainable.frozen,
                                                        plan.trainable.still))
    products, operations = 4, VISION_OPERATIONS
    # As in a language layer, with an MLP of about four widths; norms of whole patches.
    width = vision.hidden_size * (10 / layout.media_ranks + (4 + 3 * 4) / ranks)
    elementwise = card.memory_seconds(
        batch.patches * width * links.itemsize, operations=operations[0])
    sent = links.vision_layer(batch)

    def attended(backward: bool) -> float:
        return card.attention_seconds(attention * (1 + backward), length=batch.mean_frame,
                                      backward=backward)

    work = Work(
        forward=card.matrix_seconds(matrices + factors, products=products) + attended(False)
        + elementwise + sent.forward,
        forward_host=card.host_seconds(operations[0]),
    )
    if not reached:
        return work
    work = replace(
        work,
        backward=card.matrix_seconds(matrices * (1 + trained) + 2 * factors,
                                     products=products * (1 + trained))
        + attended(True) + 2 * elementwise + sent.backward,
        backward_host=card.host_seconds(operations[1]),
    )
    return _again(work, elementwise, plan.vit_recompute.granularity)


def _merger(plan: Plan, card: Card, batch: Microbatch) -> Work:
    ranks = plan.layout.tp * plan.layout.cp
    flops = batch.merger / ranks
    trainable = plan.trainable
    reached = VISION not in trainable.still or MERGER not in trainable.still
    backward = flops * (reached + (MERGER not in trainable.frozen))
    return Work(forward=card.matrix_seconds(flops), backward=card.matrix_seconds(backward))


def _head(plan: Plan, card: Card, batch: Microbatch, chunks: int) -> Work:
    decoder, ranks = plan.spec.decoder, plan.layout.tp * plan.layout.cp
    flops = 2 * batch.trained * decoder.hidden_size * decoder.vocab_size / ranks
    losses = card.memory_seconds(batch.trained * decoder.vocab_size / ranks * 2 * FP32)
    trained, again = LANGUAGE not in plan.trainable.frozen, chunks > 1
    return Work(
        forward=card.matrix_seconds(flops) + losses,
        backward=card.matrix_seconds(flops * (1 + trained + again), products=1 + trained + again)
        + losses * (1 + again),
        forward_host=card.host_seconds(END_OPERATIONS[0]),
        backward_host=card.host_seconds(END_OPERATIONS[1]),
    )
