"""What to say where nothing fits: what came closest, and what would help, tried out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_vl.errors import InputError
from megatron_vl.planner.commands import flags
from megatron_vl.planner.search import OFFLOAD, Choice, Found, Question, fits_any
from megatron_vl.training.dry_run import GIB

ADAPTERS = ({"lora_rank": 16}, {"lora_rank": 16, "quantize_base": "nf4"})  # that are tried
MOST_TIMES = 64  # as many cards are tried


def nothing_fits(question: Question, found: Found, *, more: str = "--gpus {}") -> InputError:
    """That no layout fits, and the mend; `more` says a number of cards."""
    cards = f"{question.gpus} x {question.card.name}"
    closest = found.closest
    if closest is None:
        reasons = "; ".join(f"{reason}: {number}" for reason, number in found.fell.most_common())
        return InputError(
            f"no layout of {cards} can run these options ({reasons}); change "
            f"the number of cards, --global-batch-size or --seq-length."
        )
    helps = list(_helps(question, more))
    mend = f"{' or '.join(helps)} would fit" if helps else (
        "use cards with more memory, or a smaller --seq-length")
    return InputError(
        f"no layout fits {cards}, of which a run may fill {question.card.room / GIB:.1f} GiB each: "
        f"{_said(closest)}; {mend}."
    )


def _said(choice: Choice) -> str:
    worst = choice.worst
    held, recompute = worst.held, choice.options["recompute_granularity"]
    return (
        f"{choice.plan.layout} with --recompute-granularity {recompute} comes closest and takes "
        f"{worst.bytes / GIB:.1f} GiB on stage {held.stage} (weights "
        f"{held.weight_bytes / GIB:.1f}, gradients {held.gradient_bytes / GIB:.1f}, optimizer "
        f"{held.optimizer_bytes / GIB:.1f}, activations {worst.activations.peak / GIB:.1f})"
    )


def _helps(question: Question, more: str) -> Iterator[str]:
    for adapter in ADAPTERS:
        added = {name: adapter[name] for name in adapter if name not in question.options}
        if added and _would_fit(replace(question, options=question.options | added)):
            yield " ".join(flags(added))
            break
    times = 2
    while times <= MOST_TIMES:
        gpus = question.gpus * times
        whole = gpus <= question.per_node or not gpus % question.per_node
        if whole and _would_fit(replace(question, gpus=gpus)):
            yield more.format(gpus)
            return
        times *= 2


def _would_fit(question: Question) -> bool:
    """As a search would find it, which offloads the optimizer where nothing fits without."""
    try:
        return any(fits_any(replace(question, options=question.options | more))
                   for more in ({}, OFFLOAD))
    except InputError:  # options that exclude one another
        return False
