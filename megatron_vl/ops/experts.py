"""The linear layers of a rank's experts: how they are computed, and the choice of a way.

| way | computes |
|---|---|
| `grouped` | a linear layer of all experts in one product: see `megatron_vl.ops.grouped_linear` |
| `one by one` | expert after expert, each by linear layers of its own; runs everywhere |

Importing this imports no torch: a forecast of memory asks it too.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.errors import InputError

# Numbers in 16 bytes, of which a row must be a multiple, of what torch's grouped product takes.
ALIGNMENT = {"float32": 4, "bfloat16": 8, "float16": 8}
AUTO, ON, OFF = CHOICES = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsCase:
    """What decides how experts are computed.

    Attributes:
        dtype: name of the dtype of weights and tokens.
        widths: numbers in a row of their matrices, on a rank.
        experts: of a layer on a rank.
        kept: form of weights that are not of `dtype`, as nf4; None: they are.
        has_grouped_mm: torch has a grouped product.
        cuda: a CUDA or ROCm device is there.
        capability: its compute capability; None where no device may be touched, and what depends
            on it is then left open.
    """

    dtype: str
    widths: tuple[int, ...]
    experts: int
    kept: str | None = None
    has_grouped_mm: bool = True
    cuda: bool = True
    capability: tuple[int, int] | None = None

    @classmethod
    def here(cls, *, touch_device: bool = True, **of_model) -> ExpertsCase:
        """This process on this machine; with `touch_device` false no CUDA context is made."""
        from torch.nn import functional

        from megatron_vl.platform import select_platform

        platform = select_platform()
        return cls(
            **of_model,
            has_grouped_mm=hasattr(functional, "grouped_mm"),
            cuda=platform.runs_cuda,
            capability=platform.capability() if platform.runs_cuda and touch_device else None,
        )


def _cannot_group(case: ExpertsCase) -> str | None:
    """As torch's own checks have it, on every device."""
    if case.kept is not None:
        return f"weights in {case.kept}"
    if not case.has_grouped_mm:
        return "torch is older than 2.10"
    if case.dtype not in ALIGNMENT:
        return f"no product of {case.dtype}"
    for width in case.widths:
        if width % ALIGNMENT[case.dtype]:
            return f"rows of {width} numbers in {case.dtype} are no multiple of 16 bytes"
    return None


def _gains_nothing(case: ExpertsCase) -> str | None:
    """Where torch's grouped product is a loop over the experts itself."""
    if not case.cuda:
        return "no CUDA device"
    if case.dtype != "bfloat16":
        return f"no grouped kernel for {case.dtype}"
    if case.capability is not None and case.capability[0] not in (9, 10):
        capability = ".".join(map(str, case.capability))
        return f"no grouped kernel for compute capability {capability}"
    if case.experts == 1:
        return "one expert a rank"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How experts are computed; as text its name and why it was chosen, for the log."""

    name: str
    reason: str

    @property
    def grouped(self) -> bool:
        return self.name == "grouped"

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_way(asked: str, case: ExpertsCase) -> Way:
    """What `asked` of CHOICES means in this case.

    Raises:
        InputError: a grouped product is asked for that cannot be computed.
    """
    if asked == OFF:
        return Way(name="one by one", reason="asked for")
    if asked == ON:
        if (reason := _cannot_group(case)) is not None:
            raise InputError(
                f"moe-grouped-gemm on cannot run here: {reason}; use auto, or off, which computes "
                f"experts one by one."
            )
        return Way(name="grouped", reason="asked for")
    reason = _cannot_group(case) or _gains_nothing(case)
    if reason is None:
        return Way(name="grouped", reason="torch has a kernel for it")
    return Way(name="one by one", reason=reason)
