"""One loss and one gradient, however the samples of a step are split."""

from __future__ import annotations

import sys
from pathlib import Path

import loss_splits
import pytest
import torch
import transformers
from commands import run

from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.models import load_spec
from megatron_vl.models.registry import family
from megatron_vl.parity.cases import make_samples

NAMES = {  # tensors that are stored as published
    "language_model.decoder.final_layernorm.weight": "model.language_model.norm.weight",
    "language_model.embedding.word_embeddings.weight": "model.language_model.embed_tokens.weight",
    "vision_model.patch_embed.proj.weight": "model.visual.patch_embed.proj.weight",
}


@pytest.fixture(scope="module")
def results(workshop, shared) -> dict[tuple[str, bool], dict]:
    def split(out: Path) -> None:
        out.mkdir()
        for ranks in loss_splits.SPLITS:
            done = run([
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                ranks, loss_splits.__file__, workshop.model_dir, workshop.weights(1, 1), out,
            ])
            assert done.code == 0, done.text

    out = shared.made("loss splits", split)
    return {
        (name, per_sample): torch.load(out / f"{name}-{per_sample}.pt", weights_only=True)
        for splits in loss_splits.SPLITS.values() for name in splits
        for per_sample in (False, True)
    }


def transformers_loss(model_dir: Path, per_sample: bool):
    """Its own model on every sample alone: the loss, and the gradients of `NAMES`."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    spec = load_spec(model_dir)
    of, samples = family(spec.model_type), make_samples(spec, loss_splits.CASE)
    counts = [int((sample.labels != IGNORE).sum()) for sample in samples]
    total = 0.0
    for sample, count in zip(samples, counts, strict=True):
        logits = model(
            input_ids=sample.tokens[None], use_cache=False,
            **of.judge_inputs(spec, sample.tokens, sample.grids, sample.patches,
                              of.positions(spec)(sample.tokens, sample.grids, sample.seconds)),
        ).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits, sample.labels, ignore_index=IGNORE, reduction="sum"
        ) / (count * len(samples) if per_sample else sum(counts))
        loss.backward()
        total += float(loss.detach())
    parameters = dict(model.named_parameters())
    return total, {ours: parameters[theirs].grad for ours, theirs in NAMES.items()}


@pytest.mark.parametrize("per_sample", [False, True], ids=["per token", "per sample"])
def test_all_splits_of_the_same_samples_give_one_loss_and_one_gradient(
    per_sample, results, workshop
):
    loss, gradients = transformers_loss(workshop.model_dir, per_sample)
    first = results["packed", per_sample]
    for name in (name for splits in loss_splits.SPLITS.values() for name in splits):
        one = results[name, per_sample]
        assert one["loss"] == pytest.approx(loss, rel=1e-6), name
        assert one["trained"] == first["trained"]
        for key, gradient in gradients.items():
            assert apart(one["gradients"][key], gradient) < 1e-5, (name, key)
        largest = max(float(g.abs().max()) for g in first["gradients"].values())
        for key, gradient in first["gradients"].items():
            # A key bias has no true gradient; see `parity.compare`.
            difference = apart(one["gradients"][key], gradient, floor=1e-4 * largest)
            assert difference < 1e-5, (name, key)


def test_the_two_means_differ(results):
    # Samples differ in length, so the test above can tell them apart.
    assert results["packed", True]["loss"] != pytest.approx(
        results["packed", False]["loss"], rel=1e-4
    )


def apart(ours: torch.Tensor, theirs: torch.Tensor, floor: float = 0.0) -> float:
    return float((ours - theirs).abs().max() / max(float(theirs.abs().max()), floor))
