"""transformers' language model, the judge of a family that takes text alone."""

from __future__ import annotations


def auto_class():
    """transformers' class that loads a published directory."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def inputs(spec, tokens, grids, patches, positions) -> dict:
    """What the model takes beside its tokens: nothing."""
    return {}
