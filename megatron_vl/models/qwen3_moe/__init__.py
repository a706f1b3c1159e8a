"""Qwen3 with experts, text alone: config.json and weight names; the model is common."""
