"""The best layouts as text, and the first as a YAML file of options."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import yaml

from megatron_vl.parallel import LANGUAGE
from megatron_vl.planner.commands import command, run_options, script_variables
from megatron_vl.planner.microbatch import microbatch
from megatron_vl.planner.search import Choice, Found, Question
from megatron_vl.training.dry_run import GIB, aligned

WARNING = (
    "Times are predictions from data sheets, from measurements of single operations and from what "
    "--calibrate says; steps were not measured on these cards. Memory is what train --dry-run says."
)


def answer(question: Question, found: Found) -> str:
    """All that is printed of a search that found something."""
    first = found.best[0]
    parts = [
        _head(question, found),
        "\n".join(aligned(_choices(question, found.best))),
        "\n".join(aligned(_stages(first))),
        "\n".join(aligned(_memory(question, first))),
        "run the first (in the launcher scripts, these variables):",
        command(question, first),
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


def _head(question: Question, found: Found) -> str:
    plan, card = found.best[0].plan, question.card
    nodes = -(-question.gpus // question.per_node)
    fell = sum(found.fell.values())
    grid = microbatch(plan, question.image_tokens).grid
    images = "" if grid is None else (
        f", all of them images of {plan.spec.vision.num_tokens(grid)} tokens")
    return "\n".join([
        f"{plan.spec.model_type} on {question.gpus} x {card.name}, {nodes} "
        f"node{'s' * (nodes > 1)}: a run may fill {card.room / GIB:.1f} GiB of a card",
        f"{plan.config.batch.global_batch_size} rows of {plan.row_length} tokens a step{images}",
        f"{found.fit} ways to run fit, {fell} do not{':' * (fell > 0)}",
        *(f"  {number:6,} {reason}" for reason, number in found.fell.most_common()),
    ])


def _choices(question: Question, best: Iterable[Choice]) -> Iterator[tuple[str, ...]]:
    yield ("", "layout", "rows", "recompute", "tokens/s", "s/step", "MFU", "bubble", "balance",
           "GiB", "of room")
    for number, one in enumerate(best, 1):
        step, worst = one.step, one.worst.bytes
        yield (
            f"{number}", f"{one.plan.layout}", f"{one.plan.config.batch.micro_batch_size}",
            one.options.get("recompute_granularity", "-"), f"{one.tokens_per_second:,.0f}",
            f"{step.seconds:.2f}", f"{step.utilization(one.plan, question.card):.1%}",
            f"{step.pipeline.bubble:.1%}", f"{step.pipeline.balance:.2f}",
            f"{worst / GIB:.1f}", f"{worst / question.card.room:.0%}",
        )


def _stages(choice: Choice) -> Iterator[tuple[str, ...]]:
    """Of the first, layers and time of every stage."""
    split, pipeline = choice.plan.split, choice.step.pipeline
    yield ("the first", "language layers", "busy, s", "of a step")
    for stage, busy in enumerate(pipeline.busy):
        layers = [str(len(split.layers(LANGUAGE, stage, chunk))) for chunk in range(split.vp)]
        yield f"stage {stage}", "+".join(layers), f"{busy:.2f}", f"{busy / choice.step.seconds:.0%}"


def _memory(question: Question, choice: Choice) -> Iterator[tuple[str, ...]]:
    """Of the first, GiB of its fullest rank by kind."""
    worst = choice.worst
    held, activations = worst.held, worst.activations
    numbers = (held.weight_bytes, held.gradient_bytes, held.optimizer_bytes, activations.kept,
               activations.peak - activations.kept, worst.bytes, question.card.room - worst.bytes)
    yield ("GiB of a rank", "weights", "gradients", "optimizer", "activations kept",
           "a moment's more", "together", "left")
    yield (f"stage {held.stage}", *(f"{number / GIB:.2f}" for number in numbers))
