"""Model families and the numbers that describe them; importing this starts no Megatron-Core."""

from megatron_vl.models.decoder_spec import DecoderSpec
from megatron_vl.models.registry import Family, family, known_families, load_spec
from megatron_vl.models.spec import ModelSpec, TokenIds
from megatron_vl.models.tower_spec import VisionSpec

__all__ = [
    "DecoderSpec",
    "Family",
    "ModelSpec",
    "TokenIds",
    "VisionSpec",
    "family",
    "known_families",
    "load_spec",
]
