"""Qwen2-VL on Megatron-Core: the shared vision tower and decoder are exactly its architecture."""

from __future__ import annotations

from megatron_vl.models.common.vlm import VisionLanguageModel, build_chunks

__all__ = ["VisionLanguageModel", "build_model"]

build_model = build_chunks
