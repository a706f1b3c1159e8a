"""Transformers, the judge: each sample by itself, unpadded.

It works out everything on its own but positions, of which its major versions have different ones.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.models.registry import family
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parity.adapters import of_peft
from megatron_vl.parity.cases import Case, make_samples
from megatron_vl.parity.compare import Outcome
from megatron_vl.weights.recut import from_files


def run_transformers(
    hf_dir: Path, spec: ModelSpec, case: Case, dtype: str = "float32",
    adapter: Path | None = None, fused: bool = False,
) -> Outcome:
    """Each sample alone through transformers' own model.

    Args:
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
    logits, total, trained = [], 0.0, sum(int((s.labels != IGNORE).sum()) for s in samples)
    for sample in samples:
        out = model(
            input_ids=sample.tokens[None], use_cache=False,
            **of.judge_inputs(spec, sample.tokens, sample.grids, sample.patches,
                              positions(sample.tokens, sample.grids, sample.seconds)),
        ).logits[0].float()
        logits.append(out.detach())
        loss = torch.nn.functional.cross_entropy(
            out, sample.labels, ignore_index=IGNORE, reduction="sum"
        )
        (loss / trained).backward()
        total += float(loss.detach())
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
