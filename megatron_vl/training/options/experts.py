"""Experts: a group of a run's options."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_vl.errors import InputError, check_bounds
from megatron_vl.models.common.balance import NO_BALANCE, TYPES, Balance
from megatron_vl.models.decoder_spec import ExpertsSpec
from megatron_vl.models.spec import ModelSpec
from megatron_vl.ops.experts import AUTO, CHOICES
from megatron_vl.training.options.bounds import BOUNDS
from megatron_vl.training.options.option import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsOptions:
    """How the tokens of a model with experts are spread over them, and how these are computed."""

    moe_router_load_balancing_type: str | None = option(
        None, "auxiliary loss that balances the experts of a layer: over a microbatch, over each "
        "sample (seq), or over the step so far on all replicas (global); default: aux_loss with "
        "moe-aux-loss-coeff, else what config.json says", choices=TYPES, kind=str,
    )
    moe_aux_loss_coeff: float | None = option(
        None, "coefficient of that loss in every layer; default: config.json's "
        "router_aux_loss_coef", kind=float,
    )
    moe_z_loss_coeff: float | None = option(
        None, "coefficient of a loss in every layer that keeps the router's logits small, as 1e-3; "
        "default: none", kind=float,
    )
    moe_expert_capacity_factor: float | None = option(
        None, "an expert takes at most so many times the mean number of tokens of a rank's "
        "microbatch and drops the others; default: it takes all", kind=float,
    )
    moe_grouped_gemm: str = option(
        AUTO, "a linear layer of all experts of a rank in one product (on), or one after another "
        "(off); auto: in one where torch has a kernel for it", choices=CHOICES,
    )

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)
        if self.moe_router_load_balancing_type == "none" and self.moe_aux_loss_coeff:
            raise InputError(
                f"moe-aux-loss-coeff is {self.moe_aux_loss_coeff:g} but "
                f"moe-router-load-balancing-type none adds no such loss; leave out one of them."
            )

    def balance(self, spec: ModelSpec) -> Balance:
        """What the routers of a model are told; config.json says what no option says.

        Raises:
            InputError: an option for a model without experts, or a loss with the coefficient 0.
        """
        if spec.decoder.experts is None:
            for one in fields(self):
                if (value := getattr(self, one.name)) != one.default:
                    raise InputError(
                        f"{one.name.replace('_', '-')} is {value}, but {spec.model_type} has no "
                        f"experts; leave it out."
                    )
            return NO_BALANCE
        loss, coeff = self._loss(spec.decoder.experts)
        return Balance(
            loss=loss, coeff=coeff, z_coeff=self.moe_z_loss_coeff or 0.0,
            capacity_factor=self.moe_expert_capacity_factor,
        )

    def _loss(self, experts: ExpertsSpec) -> tuple[str, float]:
        """The auxiliary loss and its coefficient."""
        loss, coeff = self.moe_router_load_balancing_type, self.moe_aux_loss_coeff
        if loss is None:
            wanted = experts.adds_aux_loss if coeff is None else coeff > 0
            loss = "aux_loss" if wanted else "none"
        if loss == "none":
            return loss, 0.0
        coeff = experts.aux_loss_coeff if coeff is None else coeff
        if coeff == 0:
            raise InputError(
                f"moe-router-load-balancing-type {loss} has the coefficient 0, which adds nothing; "
                f"give moe-aux-loss-coeff, as 1e-3, or leave it out."
            )
        return loss, coeff
