"""Flags of Baichuan2's own fine-tune.py that have defaults of their own."""

DEFAULTS = {"model_max_length": "512"}
