"""Qwen2.5-VL: Qwen2-VL's decoder and media, and a tower with windows."""
