"""Qwen3-VL: Qwen3's decoder with three axes of positions, and a tower with deepstack features."""
