"""What keeps a router from sending most tokens to few experts. No torch, no Megatron-Core."""

from __future__ import annotations

from dataclasses import dataclass

# Over which tokens the auxiliary loss balances the experts of a layer: those of a microbatch, of
# every sample by itself, or of all microbatches and replicas of the step so far.
LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
TYPES = ("none", *LOSSES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Balance:
    """The auxiliary losses of the routers, and how many tokens an expert takes."""

    loss: str = "none"  # of TYPES
    coeff: float = 0.0  # of it, in every layer
    z_coeff: float = 0.0  # of the mean square of the logits' log-sum-exp, in every layer
    # Of the mean number of tokens of an expert; None: an expert takes all that are sent to it.
    capacity_factor: float | None = None

    @property
    def has_loss(self) -> bool:
        return self.loss != "none" or self.z_coeff > 0

    def __str__(self) -> str:
        told = [f"{self.loss} x {self.coeff:g}"] if self.loss != "none" else []
        told += [f"z-loss x {self.z_coeff:g}"] if self.z_coeff else []
        told += [] if self.capacity_factor is None else [
            f"an expert takes {self.capacity_factor:g} times its mean number of tokens at most"]
        return ", ".join(told) or "no loss balances them, no token is dropped"


NO_BALANCE = Balance()

