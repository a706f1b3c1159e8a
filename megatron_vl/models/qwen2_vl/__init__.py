"""Qwen2-VL: config.json, weight names and (imported lazily) the Megatron-Core model."""
