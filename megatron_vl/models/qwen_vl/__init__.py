"""Qwen-VL and Qwen-VL-Chat, of 2023: a ViT with a resampler before a Qwen decoder."""
