"""transformers' Qwen2, the judge."""

from __future__ import annotations


def auto_class():
    """transformers' class that loads a published directory."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM
