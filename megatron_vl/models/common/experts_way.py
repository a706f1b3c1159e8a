"""How a model's experts are computed in a layout. No Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vl.models.spec import ModelSpec
from megatron_vl.ops.experts import ExpertsCase, Way, choose_way
from megatron_vl.parallel import Layout


def experts_way(
    spec: ModelSpec, layout: Layout, asked: str, *, dtype: str, kept: str | None,
    case: Callable[..., ExpertsCase] = ExpertsCase.here,
) -> Way | None:
    """As `choose_way` has it; None where there are no experts.

    Args:
        asked: of `megatron_vl.ops.experts.CHOICES`.
        kept: as ExpertsCase's.
        case: ExpertsCase itself is a case on some GPU of which nothing is known.

    Raises:
        InputError: a grouped product is asked for that cannot be computed.
    """
    experts = spec.decoder.experts
    if experts is None:
        return None
    return choose_way(asked, case(
        dtype=dtype, kept=kept, experts=experts.count // layout.ep,
        widths=(spec.decoder.hidden_size, experts.ffn_hidden_size // layout.expert_tp),
    ))
