"""Flags of Qwen-VL's own finetune.py that have defaults of their own."""

DEFAULTS = {"model_max_length": "8192", "fix_vit": "True"}
