"""What was predicted of a run's first steps, for a `Compare` of training."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.planner.advice import advice
from megatron_vl.planner.cards import Card, card_of
from megatron_vl.planner.microbatch import IMAGE_TOKENS, Microbatch, image_grid
from megatron_vl.planner.step_time import StepTime, parts, step_time
from megatron_vl.training.activations import cross_entropy_chunks
from megatron_vl.training.plan import Plan
from megatron_vl.training.reporting.first_steps import Compared, Measured
from megatron_vl.training.reporting.flops import step_flops
from megatron_vl.training.stage_memory import StageMemory, stage_memory


def compare(
    plan: Plan, measured: Measured, *, card: Card | None = None, per_node: int
) -> Compared:
    """A `Compare`, of a card that is given or else known by its name, `per_node` in a node."""
    card = card or card_of(measured.device)
    stages = predicted_memory(plan)
    step = None if card is None else predicted_step(plan, measured, stages, card, per_node)
    return Compared(
        memory_bytes=tuple(one.bytes for one in stages),
        card=None if card is None else card.name,
        step_seconds=None if step is None else step.seconds,
        busy=None if step is None else step.pipeline.busy,
        advice=advice(plan, measured, stages, card=card, per_node=per_node, predict=(
            lambda other, held: predicted_step(other, measured, held, card, per_node).seconds)),
    )


def predicted_memory(plan: Plan) -> tuple[StageMemory, ...]:
    """Of every stage."""
    chunks = cross_entropy_chunks(plan)
    return tuple(stage_memory(plan, stage, chunks=chunks) for stage in range(plan.layout.pp))


def predicted_step(
    plan: Plan, measured: Measured, stages: Sequence[StageMemory], card: Card, per_node: int
) -> StepTime:
    """Of rows that hold what a microbatch of the measured steps held on average."""
    batch = _as_measured(plan, measured)
    of = parts(plan, card, batch, per_node=per_node, chunks=cross_entropy_chunks(plan))
    return step_time(plan, [of], [one.held for one in stages], card, [batch], per_node=per_node)


def _as_measured(plan: Plan, measured: Measured) -> Microbatch:
    """Samples of one length, and images of one size that need as many FLOPs as there were."""
    number = plan.num_microbatches * plan.layout.dp
    samples = max(1, round(measured.samples / number))
    lengths = (max(1, round(measured.tokens / number / samples)),) * samples
    images = {}
    if plan.spec.vision is not None:
        grid = image_grid(plan, IMAGE_TOKENS)
        one, _ = step_flops(plan.spec, grids=[grid], lengths=[], trained=0,
                            trainable=plan.trainable)
        images = {grid: measured.vision_flops / number / one}
    return Microbatch.of(plan, lengths=lengths, trained=sum(lengths), images=images)
