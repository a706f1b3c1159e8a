"""Qwen3-VL with experts: Qwen3-VL's tower, media and positions before Qwen3's experts."""
