"""Qwen2-VL: config.json, weight names, media, positions and (imported lazily) the model."""
