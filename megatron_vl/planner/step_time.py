"""Seconds of a step: products, elementwise operations and collectives, stage by stage; no torch.

Nothing here is measured where the run will be. FLOPs are those of the model's spec, rates those of
a `Card`. A collective of n ranks sends (n - 1)/n of its bytes from every rank, twice for an
all-reduce. It is hidden by nothing, but the reduction of gradients, which runs beside the last
microbatch's backward. A chunk takes as long as its device or, if that is longer, as Python needs to
queue its layers.

Letters: T tokens and P patches of a microbatch, over all ranks that share it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.models.common.parts import MERGER
from megatron_vl.parallel import LANGUAGE, VISION
from megatron_vl.planner.cards import Card
from megatron_vl.planner.schedule import Pipeline, simulate
from megatron_vl.training.memory import FP32, ITEMSIZE, RankMemory
from megatron_vl.training.plan import Plan
from megatron_vl.training.reporting.flops import step_flops

IMAGE_TOKENS = 1024  # of an image, where nothing says how many
FORWARD_SHARE = 1 / 3  # of a layer's host time


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Seconds of one microbatch."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(forward=self.forward + other.forward, backward=self.backward + other.backward)

    def times(self, number: float) -> Work:
        return Work(forward=self.forward * number, backward=self.backward * number)

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the chunks of a layout are made of."""

    layer: Work  # of the language model
    vision_layer: Work
    start: Work  # beside layers, where the word embedding is: merger and gathered embeddings
    end: Work  # on the last chunk: logits and losses


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """What a microbatch holds: rows of one sample each, full and all trained, as in the memory."""

    lengths: tuple[int, ...]  # tokens of every row
    grid: tuple[int, int, int] | None  # patches of an image
    images: float  # so many fill the rows, a fraction where the last does not end with its row

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def patches(self) -> float:
        return self.images * math.prod(self.grid) if self.grid else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Where a step's time goes."""

    pipeline: Pipeline
    seconds: float  # of the step, to the last stage's updated weights
    flops: float  # that the step needs, over all ranks

    def utilization(self, plan: Plan, card: Card) -> float:
        """MFU: against the peak of the card's data sheet."""
        return self.flops / (self.seconds * plan.layout.world_size * card.peak_tflops * 1e12)


def microbatch(plan: Plan, image_tokens: int) -> Microbatch:
    """The rows of a microbatch, full of images of about so many tokens where there is a tower."""
    rows, vision = plan.config.batch.micro_batch_size, plan.spec.vision
    lengths = (plan.row_length,) * rows
    if vision is None:
        return Microbatch(lengths=lengths, grid=None, images=0.0)
    smallest = vision.smallest_grid
    most = -(-plan.row_length // vision.num_tokens(smallest)) * math.prod(smallest)
    patches = min(most, plan.config.data.max_patches_per_row or most)
    side = max(1, math.isqrt(min(image_tokens, plan.row_length) // vision.num_tokens(smallest)))
    grid = vision.only_grid or (smallest[0], smallest[1] * side, smallest[2] * side)
    return Microbatch(lengths=lengths, grid=grid, images=rows * patches / math.prod(grid))


def parts(plan: Plan, card: Card, batch: Microbatch, *, per_node: int, chunks: int) -> Parts:
    """What layers and ends take on one rank, whatever the split is; `chunks` of cross-entropy."""
    links = _Links(plan, card, per_node)
    merger = _merger(plan, card, batch) if batch.grid else Work()
    return Parts(
        layer=_language_layer(plan, card, batch, links),
        vision_layer=_vision_layer(plan, card, batch, links) if batch.grid else Work(),
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
            host = card.layer_host_us / 1e6
            queued = layers + vision
            again = (layers * (plan.recompute.granularity == "full")
                     + vision * (plan.vit_recompute.granularity == "full"))
            row.append(Work(
                forward=max(work.forward, host * FORWARD_SHARE * queued),
                backward=max(work.backward, host * (
                    (1 - FORWARD_SHARE) * queued + FORWARD_SHARE * again)),
            ))
        rows.append(row)
    return rows


def step_time(
    plan: Plan, work: Sequence[Sequence[Work]], stages: Sequence[RankMemory], card: Card,
    batch: Microbatch, *, per_node: int,
) -> StepTime:
    """A step of `work`, [chunk][stage], on ranks that hold `stages`."""
    links = _Links(plan, card, per_node)
    pipeline = simulate(
        [[one.forward for one in row] for row in work],
        [[one.backward for one in row] for row in work],
        microbatches=plan.num_microbatches, transfer=links.transfer(batch),
    )
    ends = []
    for stage, held in enumerate(stages):
        reduced, gathered = links.shared(held)
        backward = sum(row[stage].backward for row in work)
        update = card.memory_seconds(2 * held.optimizer_bytes + held.gradient_bytes)
        ends.append(pipeline.ends[stage] + max(0.0, reduced - backward) + update + gathered)
    return StepTime(pipeline=pipeline, seconds=max(ends), flops=_needed(plan, batch))


def _needed(plan: Plan, batch: Microbatch) -> float:
    one = step_flops(plan.spec, grids=[batch.grid] if batch.grid else [], lengths=batch.lengths,
                     trained=batch.tokens, trainable=plan.trainable)
    microbatches = plan.num_microbatches * plan.layout.dp
    return (one[0] * batch.images + one[1]) * microbatches


# ---- computation -------------------------------------------------------------------------------


def _again(work: Work, elementwise: float, granularity: str) -> Work:
    """The same with what recompute adds to backward."""
    more = {"none": 0.0, "selective": elementwise, "full": work.forward}[granularity]
    return Work(forward=work.forward, backward=work.backward + more)


def _language_layer(plan: Plan, card: Card, batch: Microbatch, links: _Links) -> Work:
    decoder, layout, experts = plan.spec.decoder, plan.layout, plan.spec.decoder.experts
    ranks, number = layout.tp * layout.cp, decoder.num_layers
    attention = decoder.attention_flops(batch.lengths) / number / ranks
    matrices = decoder.forward_flops(batch.lengths, 0) / number / ranks - attention
    factors = 2 * plan.trainable.adapter_numbers.get(LANGUAGE, 0) * batch.tokens / number / ranks
    trained = LANGUAGE not in plan.trainable.frozen
    inner = decoder.ffn_hidden_size if experts is None else (
        experts.per_token * experts.ffn_hidden_size)
    # Read and written: two norms, two sums with the residual; q, k and their rotation; SwiGLU.
    stream = 10 * decoder.hidden_size / layout.row_parts
    inside = (4 * decoder.num_attention_heads * decoder.head_dim + 3 * inner) / ranks
    elementwise = card.memory_seconds(batch.tokens * (stream + inside) * links.itemsize)
    sent = links.language_layer(batch)
    work = Work(
        forward=card.matrix_seconds(matrices + factors) + card.attention_seconds(attention)
        + elementwise + sent.forward,
        backward=card.matrix_seconds(matrices * (1 + trained) + 2 * factors)
        + card.attention_seconds(2 * attention) + 2 * elementwise + sent.backward,
    )
    return _again(work, elementwise, plan.recompute.granularity)


def _vision_layer(plan: Plan, card: Card, batch: Microbatch, links: _Links) -> Work:
    vision, layout = plan.spec.vision, plan.layout
    ranks = layout.tp * layout.cp  # cut over TP, or images divided over it
    of_layer = batch.images / vision.depth / ranks
    attention = vision.attention_flops(batch.grid) * of_layer
    tower = vision.forward_flops(batch.grid) - vision.merger_flops(batch.grid)
    matrices = tower * of_layer - attention
    factors = 2 * plan.trainable.adapter_numbers.get(VISION, 0) * batch.patches
    factors = factors / vision.depth / ranks
    trained, reached = (VISION not in what for what in (plan.trainable.frozen,
                                                        plan.trainable.still))
    # As in a language layer, with an MLP of about four widths; norms of whole patches.
    width = vision.hidden_size * (10 / layout.media_ranks + (4 + 3 * 4) / ranks)
    elementwise = card.memory_seconds(batch.patches * width * links.itemsize)
    sent = links.vision_layer(batch)
    work = Work(
        forward=card.matrix_seconds(matrices + factors) + card.attention_seconds(attention)
        + elementwise + sent.forward,
        backward=(card.matrix_seconds(matrices * (1 + trained) + 2 * factors)
                  + card.attention_seconds(2 * attention) + 2 * elementwise + sent.backward)
        if reached else 0.0,
    )
    return _again(work, elementwise, plan.vit_recompute.granularity) if reached else work


def _merger(plan: Plan, card: Card, batch: Microbatch) -> Work:
    ranks = plan.layout.tp * plan.layout.cp
    flops = plan.spec.vision.merger_flops(batch.grid) * batch.images / ranks
    trainable = plan.trainable
    reached = VISION not in trainable.still or MERGER not in trainable.still
    backward = flops * (reached + (MERGER not in trainable.frozen))
    return Work(forward=card.matrix_seconds(flops), backward=card.matrix_seconds(backward))


def _head(plan: Plan, card: Card, batch: Microbatch, chunks: int) -> Work:
    decoder, ranks = plan.spec.decoder, plan.layout.tp * plan.layout.cp
    flops = 2 * batch.tokens * decoder.hidden_size * decoder.vocab_size / ranks
    losses = card.memory_seconds(batch.tokens * decoder.vocab_size / ranks * 2 * FP32)
    trained, again = LANGUAGE not in plan.trainable.frozen, chunks > 1
    return Work(
        forward=card.matrix_seconds(flops) + losses,
        backward=card.matrix_seconds(flops * (1 + trained + again)) + losses * (1 + again),
    )


# ---- communication -----------------------------------------------------------------------------


class _Links:
    """What ranks of a layout send one another; adjacent ranks share a node."""

    def __init__(self, plan: Plan, card: Card, per_node: int) -> None:
        self.plan, self.layout, self.card, self.per_node = plan, plan.layout, card, per_node
        self.itemsize = ITEMSIZE[plan.config.model.dtype]

    def _sent(self, nbytes: float, ranks: int, *, span: int, times: int = 1) -> float:
        """Seconds of collectives of `ranks` ranks among `span` adjacent ones, of whole tensors of
        `nbytes` each."""
        if ranks == 1:
            return 0.0
        share = times * nbytes * (ranks - 1) / ranks
        return self.card.link_seconds(share, within_node=span <= self.per_node, messages=times)

    def language_layer(self, batch: Microbatch) -> Work:
        """TP gathers and scatters a row, CP trades tokens for heads, EP sends tokens away."""
        layout, decoder, experts = self.layout, self.plan.spec.decoder, (
            self.plan.spec.decoder.experts)
        tokens = batch.tokens / layout.cp
        row = tokens * decoder.hidden_size * self.itemsize
        tp = self._sent(row, layout.tp, span=layout.tp)
        heads = 2 * (decoder.num_attention_heads + decoder.num_query_groups) * decoder.head_dim
        cp = self._sent(tokens * heads / layout.tp * self.itemsize, layout.cp,
                        span=layout.tp * layout.cp)
        ep = 0.0
        if experts is not None:
            away = row / layout.tp * experts.per_token
            span = layout.expert_tp * layout.ep
            ep = self._sent(away, layout.ep, span=span, times=2)
            ep += self._sent(away * layout.expert_tp, layout.expert_tp, span=layout.tp, times=2)
        # Two gathers and two scatters; in backward the two inputs are gathered once more.
        around = 4 if experts is None else 2
        return Work(forward=around * tp + cp + ep, backward=1.5 * around * tp + cp + ep)

    def vision_layer(self, batch: Microbatch) -> Work:
        """Two all-reduces forward and two backward, where TP cuts the tower."""
        layout = self.layout
        patches = batch.patches / layout.media_ranks
        nbytes = patches * self.plan.spec.vision.hidden_size * self.itemsize
        both = self._sent(2 * nbytes, layout.vit_tp, span=layout.tp, times=2)
        return Work(forward=both, backward=both)

    def gathered_embeddings(self, batch: Microbatch) -> Work:
        """Embeddings of images that ranks have divided; their gradients are local."""
        layout = self.layout
        if not batch.grid:
            return Work()
        nbytes = batch.tokens * self.plan.spec.decoder.hidden_size * self.itemsize
        return Work(forward=self._sent(nbytes, layout.media_ranks, span=layout.tp * layout.cp))

    def transfer(self, batch: Microbatch) -> float:
        """Hidden states, and features that travel with them, to the next stage."""
        tensors = 1 + self.plan.spec.travelling_features(self.plan.split)
        width = self.plan.spec.decoder.hidden_size * self.itemsize * tensors
        return self.card.link_seconds(
            batch.tokens / self.layout.row_parts * width,
            within_node=self.layout.world_size <= self.per_node,
        )

    def shared(self, held: RankMemory) -> tuple[float, float]:
        """(reduce-scatter of a step's gradients, all-gather of updated weights)."""
        layout, options = self.layout, self.plan.config.optimizer
        gradient = self.itemsize if options.grad_reduce_in_bf16 else FP32
        span = layout.world_size // layout.pp
        buffers = [one for chunk in held.chunks for one in chunk.buffers if one.numel]
        return tuple(
            sum(self._sent(one.numel * itemsize, one.shares, span=span) for one in buffers)
            for itemsize in (gradient, self.itemsize)
        )
