"""Which activations are dropped in forward and computed again in backward, tower by tower.

Imports no Megatron-Core: what does not fit the model is refused before a rank starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_vl.errors import InputError
from megatron_vl.parallel import LANGUAGE, VISION, StageSplit


@dataclass(frozen=True, kw_only=True, slots=True)
class Recompute:
    """What one tower computes again: nothing, parts of layers (selective), or layers (full).

    The parts are norms, activation functions, and attention where no flash kernel computes it.
    """

    granularity: Literal["none", "selective", "full"] = "none"
    # For full: every layer, in groups of `num_layers` whose input alone is kept (uniform), or the
    # first `num_layers` of every chunk, one by one (block).
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1


NOTHING = Recompute()


def recompute_of(
    split: StageSplit,
    *,
    granularity: str | None,
    method: str = "uniform",
    num_layers: int = 1,
    vit_granularity: str = "same",
    vit_num_layers: int | None = None,
) -> tuple[Recompute, Recompute]:
    """(the language model's, the vision tower's).

    Args:
        granularity: selective, full, or None.
        vit_granularity: none, selective, full, or same.
        vit_num_layers: None for `num_layers`, or as many below as every chunk can do.

    Raises:
        InputError: layers that a chunk does not have, or groups that do not divide it.
    """
    language = Recompute(granularity=granularity or "none", method=method, num_layers=num_layers)
    if language.granularity == "full":
        _check(num_layers, method, split, LANGUAGE)
    granularity = language.granularity if vit_granularity == "same" else vit_granularity
    if granularity == "full" and vit_num_layers is not None:
        _check(vit_num_layers, method, split, VISION)
    elif vit_num_layers is None:
        vit_num_layers = next(n for n in range(num_layers, 0, -1)
                              if n == 1 or _fits(n, method, split.flat(VISION)))
    vision = Recompute(granularity=granularity, method=method, num_layers=vit_num_layers)
    return language, vision


def _fits(num_layers: int, method: str, counts: list[int]) -> bool:
    if method == "uniform":
        return not any(count % num_layers for count in counts)
    # The smallest chunk bounds what every one can do: an uneven split must not slip past.
    return num_layers <= min(filter(None, counts), default=0)


def _check(num_layers: int, method: str, split: StageSplit, tower: str) -> None:
    counts = split.flat(tower)
    if _fits(num_layers, method, counts):
        return
    option = "recompute-num-layers" if tower == LANGUAGE else "vit-recompute-num-layers"
    layers = "language layers" if tower == LANGUAGE else "vision layers"
    if method == "uniform":
        raise InputError(
            f"{option} {num_layers} does not divide the {layers} of every stage ({split}), as "
            f"recompute-method uniform needs; give a divisor, or recompute-method block."
        )
    smallest = min(filter(None, counts))
    raise InputError(
        f"{option} {num_layers} is more than the {smallest} {layers} of the smallest stage "
        f"({split}); give at most {smallest}, or recompute-method uniform with {option} 1, which "
        f"recomputes every layer."
    )
