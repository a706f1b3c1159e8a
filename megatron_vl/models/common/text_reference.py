"""transformers' language model, the judge of a family that takes text alone."""

from __future__ import annotations


def auto_class():
    """transformers' class that loads a published directory."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM
