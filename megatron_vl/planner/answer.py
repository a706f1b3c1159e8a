"""The best layouts as text, and the first as a YAML file of options."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import yaml

from megatron_vl.parallel.stages import WORDS
from megatron_vl.planner.cards import GB
from megatron_vl.planner.commands import command, run_options, script_variables
from megatron_vl.planner.microbatch import image_grid, most_patches, row_patches
from megatron_vl.planner.search import Choice, Found, Question
from megatron_vl.training.dry_run import GIB, aligned
from megatron_vl.training.plan import Plan

LARGE_BUBBLE = 0.15  # from which more rows are named
WARNING = (
    "Times are predictions from data sheets, from measurements of single operations and from what "
    "--calibrate says; steps were not measured on these cards. Memory is what train --dry-run says."
)


def answer(question: Question, found: Found) -> str:
    """All that is printed of a search that found something."""
    first = found.best[0]
    parts = [
        "\n".join(head_lines(question, found)),
        "\n".join(aligned(choice_rows(question, found.best))),
        "\n".join(aligned(stage_rows(first))),
        "\n".join(aligned(_memory(question, first))),
        "run the first:",
        command(question, first),
        "or, with a launcher script, its variables:",
        script_variables(question, first),
        WARNING,
    ]
    return "\n\n".join(parts)


def yaml_text(question: Question, choice: Choice) -> str:
    """Options of a run, as `train --config` reads them."""
    options = {name.replace("_", "-"): value for name, value in run_options(question,
                                                                          choice).items()}
    head = (f"# {choice.plan.spec.model_type} on {question.gpus} x {question.card.name}: "
            f"{choice.plan.layout}\n")
    return head + yaml.safe_dump(options, sort_keys=False)


# ---- tables ------------------------------------------------------------------------------------


def head_lines(question: Question, found: Found) -> list[str]:
    """What was asked, what is taken for granted, and what fell."""
    card, plan = question.card, found.best[0].plan
    nodes = -(-question.gpus // question.per_node)
    fell = sum(found.fell.values())
    return [
        f"{plan.spec.model_type} on {question.gpus} x {card.name}, {nodes} "
        f"node{'s' * (nodes > 1)}",
        f"a run may fill {card.room / GIB:.1f} of a card's {card.memory_gb * GB / GIB:.1f} GiB",
        f"{plan.config.batch.global_batch_size:,} rows of {plan.row_length:,} tokens a step",
        *_rows(question, plan),
        *_offloaded(found.best[0]),
        *_waits(found.best[0]),
        f"{found.fit:,} ways to run fit, {fell:,} do not{':' * (fell > 0)}",
        *(f"  {number:6,} {reason}" for reason, number in found.fell.most_common()),
    ]


def _offloaded(choice: Choice) -> Iterator[str]:
    host = max(one.held.host_bytes for one in choice.stages)
    if host:
        yield (f"nothing fits without --optimizer-cpu-offload, which needs TransformerEngine and "
               f"up to {host / GIB:.1f} GiB of the host's memory a card")


def _waits(choice: Choice) -> Iterator[str]:
    """That more rows would help: what even the busiest stage waits is once a step."""
    pipeline, rows = choice.step.pipeline, choice.plan.config.batch.global_batch_size
    bubble = pipeline.seconds / max(pipeline.busy) - 1
    if bubble >= LARGE_BUBBLE:
        yield (f"the busiest stage of the first waits {bubble:.0%} as long as it works: with "
               f"--global-batch-size {2 * rows} about half of that, with half as many updates")


def _rows(question: Question, plan: Plan) -> Iterator[str]:
    """What rows are taken to hold, for times and for memory."""
    row, vision = question.row, plan.spec.vision
    if question.data is None:
        yield "times are of full rows, all trained" + ("" if vision is None else (
            f" and of images of {vision.num_tokens(image_grid(plan, question.image_tokens))} tokens"
        ))
    else:
        patches = row_patches(question.data)
        yield f"times are of the rows of {question.data.source}; the mean row:"
        yield (f"  {row.samples:.1f} samples, {row.sample_tokens / row.tokens:.1%} full, "
               f"{row.trained / row.sample_tokens:.1%} of the tokens trained" + (
                   "" if vision is None else f", {row.images:.1f} images, {row.patches:,.0f} "
                   f"patches ({max(patches):,} in the largest row)"))
    if vision is not None:
        yield (f"memory is of full rows with {most_patches(plan):,} patches, the most that "
               f"training lets a row hold")


def choice_rows(question: Question, best: Iterable[Choice]) -> Iterator[tuple[str, ...]]:
    """The layouts, below a header."""
    row, counts = question.row, question.data is not None
    yield ("", "layout", "rows", "recompute", "tokens/s",
           *(("trained/s", "samples/s") if counts else ()), "s/step", "MFU", "bubble", "balance",
           "GiB", "of room")
    for number, one in enumerate(best, 1):
        step, worst = one.step, one.worst.bytes
        rows = one.plan.config.batch.global_batch_size / step.seconds
        yield (
            f"{number}", f"{one.plan.layout}", f"{one.plan.config.batch.micro_batch_size}",
            recompute_of(one), f"{one.tokens_per_second:,.0f}",
            *((f"{rows * row.trained:,.0f}", f"{rows * row.samples:,.1f}") if counts else ()),
            f"{step.seconds:.2f}", f"{step.utilization(one.plan, question.card):.1%}",
            f"{step.pipeline.bubble:.1%}", f"{step.pipeline.balance:.2f}",
            f"{worst / GIB:.1f}", f"{worst / question.card.room:.0%}",
        )


def recompute_of(choice: Choice) -> str:
    """What is computed again, in words: of the language model, and of the tower where that
    differs."""
    language = choice.plan.recompute.granularity.replace("none", "-")
    tower = choice.plan.vit_recompute.granularity.replace("none", "-")
    same = choice.plan.spec.vision is None or tower == language
    return language if same else f"{language}, tower {tower}"


def stage_rows(choice: Choice) -> Iterator[tuple[str, ...]]:
    """Of the first, layers and time of every stage."""
    split, pipeline = choice.plan.split, choice.step.pipeline
    yield ("the first", *(f"{WORDS[tower]} layers" for tower in split.towers), "busy, s",
           "of a step")
    for stage, busy in enumerate(pipeline.busy):
        layers = ("+".join(str(len(split.layers(tower, stage, chunk))) for chunk in range(split.vp))
                  for tower in split.towers)
        yield f"stage {stage}", *layers, f"{busy:.2f}", f"{busy / choice.step.seconds:.0%}"


def _memory(question: Question, choice: Choice) -> Iterator[tuple[str, ...]]:
    """Of the first, GiB of its fullest rank by kind."""
    worst = choice.worst
    held, activations = worst.held, worst.activations
    numbers = (held.weight_bytes, held.gradient_bytes, held.optimizer_bytes, activations.kept,
               activations.peak - activations.kept, worst.bytes, question.card.room - worst.bytes)
    yield ("GiB of a rank", "weights", "gradients", "optimizer", "activations kept",
           "a moment's more", "together", "left")
    yield (f"stage {held.stage}", *(f"{number / GIB:.2f}" for number in numbers))
