"""What of the language layers waits in host memory: a group of a run's options."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.errors import InputError, check_bounds
from megatron_vl.training.options.bounds import BOUNDS
from megatron_vl.training.options.option import option

_CORE, _OUTPUT = "core_attn", "attn_proj"
NORMS = ("attn_norm", "mlp_norm")
SMALLEST = 2**20
MODULES = ("qkv_linear", _CORE, _OUTPUT, *NORMS)


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadOptions:
    """Activations that leave the device from forward to backward."""

    fine_grained_activation_offloading: bool = option(
        False, "keep what offload-modules save for backward in host memory"
    )
    offload_modules: tuple[str, ...] = option(
        (), "with fine-grained-activation-offloading: modules of the language layers",
        choices=MODULES, kind=str,
    )
    min_offloaded_tensor_size: int = option(
        SMALLEST, "numbers of the smallest tensor that is offloaded"
    )

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)
        if self.fine_grained_activation_offloading is not bool(self.offload_modules):
            raise InputError(
                "fine-grained-activation-offloading and offload-modules need one another; give "
                "both, or leave both out."
            )
        if not self.offload_modules and self.min_offloaded_tensor_size != SMALLEST:
            raise InputError(
                "min-offloaded-tensor-size is of what offload-modules save, which is not given; "
                "add it, or leave this out."
            )
        if _OUTPUT in self.offload_modules and _CORE not in self.offload_modules:
            raise InputError(
                f"offload-modules has {_OUTPUT}, whose input {_CORE} keeps as its output; add "
                f"{_CORE}."
            )

    def check(self, *, cpu_offloading: bool, recompute: str | None) -> None:
        """Raises InputError: the same layers are offloaded or computed again as a whole."""
        if not self.offload_modules:
            return
        if cpu_offloading:
            raise InputError(
                "offload-modules and cpu-offloading, of whole layers, exclude one another; leave "
                "out one of them."
            )
        if recompute == "full":
            raise InputError(
                "offload-modules have nothing to keep with recompute-granularity full, which "
                "keeps the input of a layer alone; use selective, or leave out one of them."
            )
