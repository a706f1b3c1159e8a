"""Qwen2 and Qwen2.5, text alone: config.json, weight names and positions; the model is common."""
