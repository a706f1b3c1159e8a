"""Keeps a bad step from spoiling the weights.

A loss or a gradient that is not finite, or, where asked for, a gradient far larger than those
before it, changes nothing: no update, no step of the schedule. The next step sees the next data.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import chain
from statistics import median

import torch

from megatron_vl.errors import InputError
from megatron_vl.platform.optimizer import clip

NORMS = 64  # of the latest updates: what is usual
LEAST = 16  # of them, before a spike is called one
NAMED = 64  # samples that a message names at most: a packed row's


class StepGuard:
    """Says of each step whether it may change the weights, and counts those that may not.

    All ranks see the same loss and norm, so they decide alike.

    Args:
        max_skipped: steps that may be skipped before the run is given up.
        spike: how many times the median norm of the latest updates is a spike; 0: nothing is.
    """

    def __init__(self, *, max_skipped: int, spike: float = 0.0):
        self.max_skipped, self.spike = max_skipped, spike
        self.skipped = 0  # since the run began, over all its restarts
        self.norms: deque[float] = deque(maxlen=NORMS)

    def fault(self, loss: float, norm: float) -> str:
        """What is wrong with a step of this loss and gradient norm; empty if nothing is."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        usual = median(self.norms) if len(self.norms) >= LEAST else math.inf
        if self.spike and norm > self.spike * usual:
            return f"the gradient norm {norm:.3g} is {norm / usual:.1f} times the usual {usual:.3g}"
        return ""

    @property
    def exhausted(self) -> bool:
        """Whether the next step that is skipped is one too many."""
        return self.skipped >= self.max_skipped

    def accept(self, norm: float) -> None:
        self.norms.append(norm)

    def skip(self, iteration: int, fault: str, samples: str) -> str:
        """Count a skipped step; returns what to say.

        Raises:
            InputError: too many.
        """
        self.skipped += 1
        what = f"iteration {iteration}: {fault}; {samples}"
        if self.skipped > self.max_skipped:
            raise InputError(
                f"{what}; with it {self.skipped} step{'s were' if self.skipped > 1 else ' was'} "
                f"skipped, more than max-skipped-steps {self.max_skipped}; lower lr, or look at "
                f"these samples."
            )
        return f"skipped {what} ({self.skipped} of at most {self.max_skipped} skipped steps)"

    def state(self) -> dict:
        """To be saved with a checkpoint."""
        return {"skipped": self.skipped, "norms": list(self.norms)}

    def restore(self, state: dict) -> None:
        self.skipped = state.get("skipped", 0)
        self.norms = deque(state.get("norms", ()), maxlen=NORMS)


@torch.no_grad()
def update(optimizer, loss: float, guard: StepGuard) -> tuple[bool, float | None, str]:
    """Megatron-Core's `optimizer.step()`, with the guard asked between the norm and the update.

    Returns:
        whether the weights were updated, the gradient's norm before clipping (None if fp16's loss
        scale was too large for it), and what was wrong with the step.
    """
    if optimizer.prepare_grads():  # fp16 alone: an overflow, and the scale is lowered
        # The loss itself is not scaled: no lower scale makes it finite.
        return False, None, "" if math.isfinite(loss) else "the loss is not finite"
    norm = float(optimizer.get_grad_norm())
    if fault := guard.fault(loss, norm):
        return False, norm, fault
    guard.accept(norm)
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if one.is_stub_optimizer or not one.config.clip_grad > 0 or not one.get_parameters():
            continue
        clip(one, norm)
    return optimizer.step_with_ready_grads(), norm, ""


def blame(losses: list[dict], sample_keys: list[list[str]]) -> str:
    """The samples of the rows whose loss is not finite, over all ranks; else of all rows.

    Args:
        losses: what each microbatch left for the log; held by last stages alone.
        sample_keys: of each microbatch.
    """
    mine = []
    for number, one in enumerate(losses):
        if not torch.isfinite(one["sums"]).all():
            mine += sample_keys[number]
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    names = list(dict.fromkeys(name for one in everyone for name in one))
    if names:
        return f"the samples of its row are {', '.join(names[:NAMED])}"
    torch.distributed.all_gather_object(everyone, list(chain(*sample_keys)))
    names = list(dict.fromkeys(name for one in everyone for name in one))
    return f"its samples were {', '.join(names[:NAMED])}"
