"""Variable-length attention: one signature, a table of backends.

Letters: T packed tokens over all rows, N query heads, G key/value heads, H head dim.
The SDPA backend is the reference: it runs on every device and every other backend is tested
against it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_vl.errors import InputError
from megatron_vl.ops.segments import Segments

logger = logging.getLogger(__name__)


class VarlenAttention(Protocol):
    """softmax(q k^T * scale) v inside every segment, never across."""

    def __call__(
        self,
        q_TNH: torch.Tensor,
        k_TGH: torch.Tensor,
        v_TGH: torch.Tensor,
        segments: Segments,
        *,
        causal: bool,
        scale: float,
    ) -> torch.Tensor:
        """Returns [T, N, H] in the dtype of `q_TNH`; N is a multiple of G."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    name: str
    load: Callable[[], VarlenAttention]  # imports what it needs, only when chosen
    why_not: Callable[[], str | None]  # None where it runs, else the reason in a few words


def _load_sdpa() -> VarlenAttention:
    from megatron_vl.ops.sdpa import attention

    return attention


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(name="sdpa", load=_load_sdpa, why_not=lambda: None),
}


def choose_backend(name: str = "auto") -> VarlenAttention:
    """The backend called `name`, or the first of the table that runs here; logged once.

    Raises:
        InputError: an unknown name, or a backend that cannot run here.
    """
    if name == "auto":
        for backend in BACKENDS.values():
            if backend.why_not() is None:
                logger.info("attention backend: %s (first that runs here)", backend.name)
                return backend.load()
    check_backend(name)
    logger.info("attention backend: %s (asked for)", name)
    return BACKENDS[name].load()


def check_backend(name: str) -> None:
    """Whether `name` can be chosen here; loads nothing.

    Raises:
        InputError: an unknown name, or a backend that cannot run here.
    """
    if name == "auto":
        return
    if name not in BACKENDS:
        raise InputError(
            f"attention-backend {name!r} is unknown; use auto or one of {', '.join(BACKENDS)}."
        )
    reason = BACKENDS[name].why_not()
    if reason is not None:
        raise InputError(f"attention-backend {name} cannot run here: {reason}; use auto.")
