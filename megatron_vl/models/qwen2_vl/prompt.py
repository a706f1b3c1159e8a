"""What the family's published chat template writes, without rendering it. Pure Python."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megatron_vl.models.family import Said, Span, TemplateWriter
from megatron_vl.models.media import MEDIA_KINDS

_PUBLISHED = "a0bc6f6fc7a29a80017a433e8f03a1cc1236e838a944a2d034295a60c4f2fddb"  # SHA-256
_MEDIA = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in MEDIA_KINDS}


def template_writer(source: str) -> TemplateWriter | None:
    """See `megatron_vl.models.family.Family`."""
    return _write if hashlib.sha256(source.encode()).hexdigest() == _PUBLISHED else None


def _write(turns: Sequence[Said]) -> tuple[str, dict[int, Span]]:
    said, spans = "", {}
    if turns[0].role != "system":
        said = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for number, turn in enumerate(turns):
        said += f"<|im_start|>{turn.role}\n"
        begin = len(said)
        said += "".join(_MEDIA[part.media] if part.media else part.text for part in turn.parts)
        said += "<|im_end|>"
        if turn.role == "assistant":
            spans[number] = begin, len(said)
        said += "\n"
    return said, spans
