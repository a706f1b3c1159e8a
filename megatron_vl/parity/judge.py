"""Transformers, the judge: each sample by itself, unpadded.

It works out everything on its own but positions, of which its major versions have different ones.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_vl.data.encode.samples import IGNORE, EncodedSample
from megatron_vl.models.common.balance import NO_BALANCE, Balance
from megatron_vl.models.registry import family
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parity.adapters import of_peft
from megatron_vl.parity.balance import balance_loss, loads
from megatron_vl.parity.cases import Case, make_samples
from megatron_vl.parity.compare import Outcome
from megatron_vl.weights.recut import from_files


def run_transformers(
    hf_dir: Path, spec: ModelSpec, case: Case, dtype: str = "float32",
    adapter: Path | None = None, fused: bool = False, balance: Balance = NO_BALANCE, dp: int = 1,
) -> Outcome:
    """Each sample alone through transformers' own model.

    Args:
        balance: the routers' losses, whose gradients are wanted too.
        dp: replicas, of which each has a microbatch at a time.
        adapter: a directory of PEFT's, whose factors' gradients are wanted then, not the model's.
        fused: of A's that are one elsewhere, each gets the sum of their gradients.
    """
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    transformers.utils.logging.disable_progress_bar()
    of = family(spec.model_type)
    model = of.judge_of(
        hf_dir, dtype=getattr(torch, dtype), attn_implementation="eager",
        experts_implementation="eager",  # its grouped products refuse some widths
    )
    weights = of.weight_map(spec)
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    samples, positions = make_samples(spec, case), of.positions(spec)
    routes = {"output_router_logits": True} if balance.has_loss else {}

    def forward(sample: EncodedSample):
        return model(
            input_ids=sample.tokens[None], use_cache=False, **routes,
            **of.judge_inputs(spec, sample.tokens, sample.grids, sample.patches,
                              positions(sample.tokens, sample.grids, sample.seconds)),
        )

    logits, total, trained = [], 0.0, sum(map(_trained, samples))
    size = case.samples_per_row * case.rows_per_microbatch
    microbatches = [samples[i : i + size] for i in range(0, len(samples), size)]
    batches = [None] * len(microbatches)
    if balance.loss == "global_aux_loss":
        with torch.no_grad():
            each = [loads([forward(one).router_logits for one in group],
                          spec.decoder.experts.per_token) for group in microbatches]
        batches = [sum(each[: number // dp * dp + dp]) for number in range(len(each))]
    for group, batch in zip(microbatches, batches, strict=True):
        # Kept over a microbatch, whose samples a router's loss joins.
        routed, weight = [], sum(map(_trained, group)) / trained
        for sample in group:
            given = forward(sample)
            out = given.logits[0].float()
            logits.append(out.detach())
            loss = torch.nn.functional.cross_entropy(
                out, sample.labels, ignore_index=IGNORE, reduction="sum"
            )
            if loss.requires_grad:  # no adapter of a vision tower has a part in text alone
                (loss / trained).backward(retain_graph=balance.has_loss)
            total += float(loss.detach())
            if balance.has_loss:
                routed.append(given.router_logits)
        if balance.has_loss:
            loss = balance_loss(balance, routed, spec.decoder.experts.per_token, batch)
            (weight * loss).backward()
    if adapter is not None:
        gradients = of_peft(model, weights, fused=fused)
    else:
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.float()
                     for name, p in model.named_parameters()}
        # As it saves weights: where it holds several published tensors in one, each by itself.
        gradients = revert_weight_conversion(model, gradients)
        gradients = from_files({weights.published_name(name): one
                                for name, one in gradients.items()}, weights)
    return Outcome(logits=logits, loss=total / trained, gradients=gradients)


def _trained(sample: EncodedSample) -> int:
    """Its positions that are trained."""
    return int((sample.labels != IGNORE).sum())
