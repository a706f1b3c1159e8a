"""Adapters: a group of a run's options."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.errors import InputError, check_bounds
from megatron_vl.ops.blockwise import FORMS
from megatron_vl.peft.targets import ALL_LINEAR, HELP
from megatron_vl.training.options.bounds import BOUNDS
from megatron_vl.training.options.option import defaults, option


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraOptions:
    """Train low-rank factors beside the weights, which stay as they are (LoRA)."""

    lora_rank: int | None = option(
        None, "rank of the factors; without it, or adapter, the weights themselves are trained",
        kind=int,
    )
    lora_alpha: float | None = option(
        None, "the factors' product is multiplied by this over the rank; default: twice the rank",
        kind=float,
    )
    use_rslora: bool = option(False, "divide lora-alpha by the square root of the rank instead")
    lora_dropout: float = option(
        0.0, "share of an adapted layer's input that its factors do not see in training"
    )
    lora_target: tuple[str, ...] = option(
        (ALL_LINEAR,), f"layers that get factors, one or several of: {HELP}", kind=str
    )
    lora_fused: bool = option(
        False, "one first factor for q, k and v, and one for gate and up, where each has its own "
        "otherwise"
    )
    lora_lr_ratio: float = option(
        1.0, "the learning rate of the second factor over that of the first (LoRA+)"
    )
    adapter: str | None = option(
        None, "go on with the factors of this directory, which PEFT or convert --to peft wrote; "
        "it says rank, alpha and layers", kind=str,
    )
    quantize_base: str | None = option(
        None, "with lora-rank or adapter, keep the linear weights of the language model's layers "
        "in 4 or 8 bits a value (QLoRA)", choices=FORMS, kind=str,
    )
    train_vit: bool = option(
        False, "with lora-rank or adapter, train the vision tower's own weights"
    )
    train_merger: bool = option(False, "the same of the merger's")
    save_base: bool = option(
        False, "with lora-rank or adapter, save all weights, not what is trained alone"
    )

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)
        usual = defaults(type(self))
        given = [name for name in usual if getattr(self, name) != usual[name]]
        if not self.given:
            if given:
                raise InputError(
                    f"{_flag(given[0])} is about an adapter, and none is trained; give lora-rank, "
                    f"or leave it out."
                )
            return
        if self.quantize_base is not None and self.save_base:
            raise InputError(
                f"save-base saves the model's weights, and with quantize-base {self.quantize_base} "
                f"they are not whole in memory; leave out one of them (convert --merge makes the "
                f"whole model of what is trained)."
            )
        if self.adapter is not None:
            says = [name for name in ("lora_rank", "lora_alpha", "use_rslora", "lora_target")
                    if name in given]
            if says:
                raise InputError(
                    f"{_flag(says[0])} is given but adapter {self.adapter} says it itself; leave "
                    f"out one of them."
                )

    @property
    def given(self) -> bool:
        """Whether an adapter is trained."""
        return self.lora_rank is not None or self.adapter is not None

    @property
    def alpha(self) -> float:
        """Of a new adapter."""
        return alpha_of(self.lora_rank, self.lora_alpha)


def alpha_of(rank: int, given: float | None) -> float:
    """What lora-alpha is, or comes to where it is not given."""
    return 2.0 * rank if given is None else given


def _flag(name: str) -> str:
    return name.replace("_", "-")
