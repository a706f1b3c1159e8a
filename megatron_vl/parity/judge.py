"""Transformers, the judge: each sample by itself, unpadded.

It works out everything on its own but positions, of which its major versions have different ones.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from megatron_vl.data.encode.samples import IGNORE, EncodedSample
from megatron_vl.models.registry import family
from megatron_vl.models.spec import VLMSpec
from megatron_vl.parity.cases import Case, is_video, make_samples
from megatron_vl.parity.compare import Outcome


def run_transformers(hf_dir: Path, spec: VLMSpec, case: Case, dtype: str = "float32") -> Outcome:
    """Each sample alone through transformers' own model."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        hf_dir, dtype=getattr(torch, dtype), attn_implementation="eager", trust_remote_code=False,
        local_files_only=True,
    )
    samples = make_samples(spec, case)
    logits, total, trained = [], 0.0, sum(int((s.labels != IGNORE).sum()) for s in samples)
    for sample in samples:
        out = model(
            input_ids=sample.tokens[None], use_cache=False, **vision_arguments(spec, sample)
        ).logits[0].float()
        logits.append(out.detach())
        loss = torch.nn.functional.cross_entropy(
            out, sample.labels, ignore_index=IGNORE, reduction="sum"
        )
        (loss / trained).backward()
        total += float(loss.detach())
    return Outcome(
        logits=logits,
        loss=total / trained,
        gradients={
            published_name(name): torch.zeros_like(p) if p.grad is None else p.grad.float()
            for name, p in model.named_parameters()
        },
    )


def vision_arguments(spec: VLMSpec, sample: EncodedSample) -> dict:
    """A sample's media as transformers' model takes them: images and videos apart.

    With our positions: its own differ after a video, from one of its major versions to the next.
    """
    if sample.patches is None:
        return {}
    kinds = {
        ("pixel_values", "image_grid_thw"): [], ("pixel_values_videos", "video_grid_thw"): [],
    }  # fmt: skip
    images, videos = kinds.values()
    for grid, patches in zip(
        sample.grids, sample.patches.split([*map(math.prod, sample.grids)]), strict=True
    ):
        (videos if is_video(grid) else images).append((patches, grid))
    positions = family(spec.model_type).positions(spec)
    arguments = {
        "position_ids": positions(sample.tokens, sample.grids)[:, None],
        "mm_token_type_ids": (
            (sample.tokens == spec.tokens.image).int()
            + 2 * (sample.tokens == spec.tokens.video).int()
        )[None]
    }
    for (pixels, grids), found in kinds.items():
        if found:
            arguments[pixels] = torch.cat([patches for patches, _ in found])
            arguments[grids] = torch.tensor([grid for _, grid in found])
    return arguments


def published_name(name: str) -> str:
    """transformers' in-memory name -> the name in published checkpoints."""
    name = name.replace("model.visual.", "visual.", 1)
    return name.replace("model.language_model.", "model.", 1)
