"""Variable-length attention: one signature, a table of backends, and the choice of one.

Letters: T packed tokens over all rows, N query heads, G key/value heads, H head dim.
The SDPA backend is the reference: it runs on every device and every other backend is tested
against it. Importing this imports neither torch nor a backend: options name backends.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from megatron_vl.errors import InputError

if TYPE_CHECKING:
    import torch

    from megatron_vl.ops.segments import Segments


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


LIBRARIES = ("torch", "transformer-engine", "flash-attn", "flash-attn-3", "flash-attn-4")
HALF = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCase:
    """What decides whether a backend can run.

    Attributes:
        dtype: name of the dtype of q, k and v.
        head_dim: H.
        deterministic: the gradients must repeat bit for bit.
        npu: an Ascend NPU is there.
        cuda: a CUDA or ROCm device is there.
        capability: its compute capability; None while no device may be touched, and what depends
            on it is then left open.
        cudnn: cuDNN's version as it counts itself, 9.6.0 is 90600; 0 without cuDNN.
        versions: of those of LIBRARIES that are installed.
    """

    dtype: str
    head_dim: int
    deterministic: bool = False
    npu: bool = False
    cuda: bool = False
    capability: tuple[int, int] | None = None
    cudnn: int = 0
    versions: Mapping[str, tuple[int, ...]]

    @classmethod
    def here(
        cls, *, dtype: torch.dtype | str, head_dim: int, deterministic: bool = False,
        touch_device: bool = True,
    ) -> AttentionCase:
        """This process on this machine; with `touch_device` false no CUDA context is made."""
        from megatron_vl.platform import select_platform  # imports torch

        platform = select_platform()
        touched = platform.runs_cuda and touch_device
        return cls(
            dtype=str(dtype).removeprefix("torch."),
            head_dim=head_dim,
            deterministic=deterministic,
            npu=platform.name == "npu",
            cuda=platform.runs_cuda,
            capability=platform.capability() if touched else None,
            cudnn=platform.cudnn_version() if touched else 0,
            versions=_installed(),
        )


def _installed() -> dict[str, tuple[int, ...]]:
    found = {}
    for name in LIBRARIES:
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = tuple(map(int, re.match(r"\d+(\.\d+)*", text)[0].split(".")))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """A row of the table.

    Attributes:
        why_not: None where it can run, else the reason in a few words.
        load: gives the function, deterministic or not; imports what it needs. Raises ImportError
            or OSError where that is installed and yet unusable.
    """

    name: str
    why_not: Callable[[AttentionCase], str | None]
    load: Callable[[bool], VarlenAttention]


# ---- why not ----------------------------------------------------------------------------------


def _lacks(
    case: AttentionCase, library: str, oldest: tuple[int, ...], *,
    capability: tuple[int, int] = (8, 0), head_dim: int = 256,
) -> str | None:
    """The first thing missing of what every kernel for half precision needs."""
    if not case.cuda:
        return "no CUDA device"
    if case.dtype not in HALF:
        return f"no kernel for {case.dtype}"
    if case.head_dim % 8 or case.head_dim > head_dim:
        return f"head dim {case.head_dim} is no multiple of 8 up to {head_dim}"
    if library not in case.versions:
        return f"{library} is not installed"
    if case.versions[library] < oldest:
        return f"{library} {_dotted(case.versions[library])} is older than {_dotted(oldest)}"
    if case.capability is not None and case.capability < capability:
        return f"compute capability {_dotted(case.capability)} is below {_dotted(capability)}"
    return None


def _why_not_te_fused(case: AttentionCase) -> str | None:
    """As TransformerEngine's nvte_get_fused_attn_backend has it for packed rows in training."""
    reason = _lacks(case, "transformer-engine", (2, 4), capability=(9, 0), head_dim=128)
    if reason is not None or case.capability is None:
        return reason
    if case.capability >= (12, 0):
        return f"compute capability {_dotted(case.capability)} has no kernel for packed rows"
    if case.cudnn < 90600 or case.cudnn in (91000, 91001):
        return "needs cuDNN 9.6 or newer, but 9.10.0 and 9.10.1"
    if case.deterministic and case.capability >= (10, 0):
        return f"not deterministic on compute capability {_dotted(case.capability)}"
    return None


def _why_not_te_flash(case: AttentionCase) -> str | None:
    reason = _lacks(case, "transformer-engine", (2, 4))
    if reason is not None:
        return reason
    if "flash-attn-3" in case.versions and case.capability in (None, (9, 0)):
        return None
    return _why_not_flash2(case)


def _why_not_flash2(case: AttentionCase) -> str | None:
    return _lacks(case, "flash-attn", (2, 7))


def _why_not_flash4(case: AttentionCase) -> str | None:
    """As flash_attn.cute's own checks have it."""
    reason = _lacks(case, "flash-attn-4", (4, 0), capability=(9, 0))
    if reason is not None or case.capability in (None, (9, 0)):
        return reason
    capability = f"on compute capability {_dotted(case.capability)}"
    if case.head_dim > 128:
        return f"head dim {case.head_dim} is above 128 {capability}"
    if case.deterministic and case.capability >= (12, 0):
        return f"not deterministic {capability}"
    return None


def _why_not_torch_varlen(case: AttentionCase) -> str | None:
    # The first that was tried.
    return _lacks(case, "torch", (2, 11))


def _why_not_npu_fusion(case: AttentionCase) -> str | None:
    """As the documentation of npu_fusion_attention has it (Ascend/op-plugin).

    torch_npu lists its backward among the operators that it can make deterministic for none of the
    devices but the 950DT.
    """
    if not case.npu:
        return "no Ascend NPU"
    if case.dtype not in (*HALF, "float32"):
        return f"no kernel for {case.dtype}"
    if case.head_dim > 768:
        return f"head dim {case.head_dim} is above 768"
    if case.deterministic:
        return "not known to be deterministic"
    return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# ---- load -------------------------------------------------------------------------------------


def _load_te_fused(deterministic: bool) -> VarlenAttention:
    from megatron_vl.ops.te import TEAttention

    return TEAttention("fused", deterministic)


def _load_te_flash(deterministic: bool) -> VarlenAttention:
    from megatron_vl.ops.te import TEAttention

    return TEAttention("flash", deterministic)


def _load_flash2(deterministic: bool) -> VarlenAttention:
    from flash_attn import flash_attn_varlen_func

    from megatron_vl.ops.flash import attention

    return partial(attention, kernel=flash_attn_varlen_func, deterministic=deterministic)


def _load_flash4(deterministic: bool) -> VarlenAttention:
    from flash_attn.cute import flash_attn_varlen_func

    from megatron_vl.ops.flash import attention

    return partial(attention, kernel=flash_attn_varlen_func, deterministic=deterministic)


def _load_torch_varlen(deterministic: bool) -> VarlenAttention:
    import torch

    if not torch.backends.cuda.is_flash_attention_available():
        raise ImportError("this torch was built without flash attention")
    from megatron_vl.ops.torch_varlen import attention

    return attention


def _load_npu_fusion(deterministic: bool) -> VarlenAttention:
    from megatron_vl.ops.attention_npu import attention

    return attention


def _load_sdpa(deterministic: bool) -> VarlenAttention:
    from megatron_vl.ops.sdpa import attention

    return attention


# In the order in which `auto` tries them: cuDNN's fused kernels, flash-attention, torch's own. That
# of NPUs runs where none of these does.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(name="te-fused", why_not=_why_not_te_fused, load=_load_te_fused),
        Backend(name="te-flash", why_not=_why_not_te_flash, load=_load_te_flash),
        Backend(name="flash2", why_not=_why_not_flash2, load=_load_flash2),
        Backend(name="flash4", why_not=_why_not_flash4, load=_load_flash4),
        Backend(name="torch-varlen", why_not=_why_not_torch_varlen, load=_load_torch_varlen),
        Backend(name="npu-fusion", why_not=_why_not_npu_fusion, load=_load_npu_fusion),
        Backend(name="sdpa", why_not=lambda case: None, load=_load_sdpa),
    )
}

FLASH_FIRST = "flash-first"  # flash-attention before the fused kernels, if both are there
ORDERS = ("auto", FLASH_FIRST)  # what may stand for a name: the first of them that runs


# ---- choose -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A loaded backend; as text its name and why it was chosen, for the log."""

    name: str
    reason: str
    attention: VarlenAttention

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def check_backend(
    name: str, case: AttentionCase, backends: Mapping[str, Backend] = BACKENDS
) -> None:
    """Refuse what can be told without loading it.

    Raises:
        InputError: an unknown name, or a backend that cannot run in this case.
    """
    if name in ORDERS:
        return
    if name not in backends:
        raise InputError(
            f"attention-backend {name!r} is unknown; use one of {', '.join([*ORDERS, *backends])}."
        )
    reason = backends[name].why_not(case)
    if reason is not None:
        raise _cannot_run(name, reason)


def choose_backend(
    name: str = "auto", *, dtype: torch.dtype | str, head_dim: int, deterministic: bool = False,
    backends: Mapping[str, Backend] = BACKENDS,
) -> Choice:
    """The backend called `name`, or the first in the order of that name that runs here, loaded.

    Args:
        deterministic: ask the library for gradients that repeat bit for bit. torch's own kernels
            (torch-varlen, sdpa) take no argument for it and follow
            `torch.use_deterministic_algorithms`, which is the caller's to set.

    Raises:
        InputError: an unknown name, or a backend that cannot run here.
    """
    case = AttentionCase.here(dtype=dtype, head_dim=head_dim, deterministic=deterministic)
    check_backend(name, case, backends)
    passed_over = []
    for backend in _in_order(name, backends):
        reason = backend.why_not(case)
        if reason is None:
            try:
                attention = backend.load(deterministic)
            except (ImportError, OSError) as error:
                reason = f"does not load, {str(error).splitlines()[0]}"
            else:
                how = "first that runs here" if name in ORDERS else "asked for"
                why = "; ".join(filter(None, (how, ", ".join(passed_over))))
                return Choice(name=backend.name, reason=why, attention=attention)
        if name not in ORDERS:
            raise _cannot_run(name, reason)
        passed_over.append(f"{backend.name}: {reason}")
    raise AssertionError("sdpa runs everywhere")


def _in_order(name: str, backends: Mapping[str, Backend]) -> list[Backend]:
    if name == FLASH_FIRST:  # the others keep their order
        return sorted(backends.values(), key=lambda backend: "flash" not in backend.name)
    return [*backends.values()] if name in ORDERS else [backends[name]]


def _cannot_run(name: str, reason: str) -> InputError:
    return InputError(
        f"attention-backend {name} cannot run here: {reason}; use auto, or sdpa, which runs "
        f"everywhere."
    )
