"""Qwen3, text alone: config.json and weight names; the model is common."""
