"""Which layers are on which ranks, and who talks to whom: as SVG and as a table's rows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from megatron_vl.parallel import Coordinates, Layout, StageSplit
from megatron_vl.platform.init import ranks

_REPLICAS = 4  # data-parallel replicas that are drawn; all are counted
_GROUPS = 6  # groups of one kind that are listed
_SIDE, _GAP, _LETTER = 34, 26, 6.3  # pixels: of a rank's square, between boxes, of small text
_VISION, _LANGUAGE, _LINE = "#cfe3f5", "#d3eed2", "#666"


def stage_layers(split: StageSplit, stage: int) -> list[str]:
    """What every chunk of a stage holds, in words; layers count from 0."""
    rows = []
    for chunk in range(split.vp):
        at, held = chunk * split.pp + stage, []
        vision = split.layers("vit", stage, chunk)
        held += ["patches"] if at == 0 else []
        held += [_range("vision", vision)] if len(vision) else []
        held += ["merger", "embedding"] if (stage, chunk) == split.last_vision_chunk else []
        language = split.layers("llm", stage, chunk)
        held += [_range("LLM", language)] if len(language) else []
        held += ["head"] if at == split.pp * split.vp - 1 else []
        rows.append(", ".join(held) or "nothing")
    return rows


def _range(name: str, layers: range) -> str:
    return f"{name} {layers[0]}" + (f"–{layers[-1]}" if len(layers) > 1 else "")


def groups(layout: Layout, kind: str) -> list[list[int]]:
    """The ranks that differ in one coordinate alone, or, for `data`, in dp and cp."""
    own = {"tensor": ("tp",), "context": ("cp",), "pipeline": ("pp",), "data": ("dp", "cp")}[kind]
    found: dict[tuple, list[int]] = {}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        key = tuple(getattr(at, name) for name in ("tp", "cp", "dp", "pp") if name not in own)
        found.setdefault(key, []).append(rank)
    return list(found.values())


def talks(
    layout: Layout, split: StageSplit, *, distributed_optimizer: bool = False, tied: bool = False
) -> list[tuple[str, str, str]]:
    """(kind, what is sent, which ranks among each other) of every kind there is more than one of.
    """
    rows = []
    if layout.tp > 1:
        what = "gathered and reduce-scattered" if layout.sequence_parallel else "summed"
        rows.append(("tensor", f"activations, {what} in every layer"))
    if layout.cp > 1:
        rows.append(("context", "queries, keys and values around attention; image embeddings"))
    if layout.pp > 1:
        rows.append(("pipeline", "activations to the next stage, gradients back"))
    if layout.dp * layout.cp > 1:
        what = ("reduce-scattered after backward, weights gathered after the update"
                if distributed_optimizer else "summed after backward")
        rows.append(("data", f"gradients, {what}"))
    told = [(kind, what, _listed(groups(layout, kind))) for kind, what in rows]
    first = split.last_vision_chunk[0]  # where the embedding is
    if first != layout.pp - 1 and tied:
        ends = [[one[first], one[-1]] for one in groups(layout, "pipeline")]
        told.append(("embedding", "gradients of the weight that is embedding and head",
                     _listed(ends)))
    if layout.model_size > 1:
        replicas = [
            sorted(layout.rank(Coordinates(tp=tp, cp=cp, dp=dp, pp=pp)) for tp in range(layout.tp)
                   for cp in range(layout.cp) for pp in range(layout.pp))
            for dp in range(layout.dp)
        ]
        told.append(("rows", "what its first rank read, to the others of a replica",
                     _listed(replicas)))
    return told


def _listed(found: Sequence[Sequence[int]]) -> str:
    named = "; ".join(ranks(list(one)).split(" ", 1)[1] for one in found[:_GROUPS])
    more = len(found) - _GROUPS
    return named + (f"; and {more} more" if more > 0 else "")


def draw_layout(layout: Layout, split: StageSplit) -> str:
    """Stages from top to bottom, replicas from left to right; in a box tp to the right, cp down."""
    replicas = min(layout.dp, _REPLICAS)
    box_w, box_h = layout.tp * _SIDE + 12, layout.cp * _SIDE + 12
    height = max(box_h, 18 * layout.vp + 26)
    words = 40 + _LETTER * max(
        len(text) for pp in range(layout.pp) for text in _stage_texts(split, pp)
    )
    top, left = 34, words + 20
    width = left + replicas * (box_w + _GAP) + (120 if layout.dp > replicas else 20)
    total = top + layout.pp * (height + _GAP) + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" '
        f'width="{width}" height="{total}" font-family="system-ui, sans-serif" font-size="13">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto-start-reverse">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{_LINE}"/></marker></defs>',
    ]
    for dp in range(replicas):
        x = left + dp * (box_w + _GAP)
        parts.append(_text(x + box_w / 2, 20, f"data {dp}", anchor="middle"))
    if layout.dp > replicas:
        parts.append(_text(left + replicas * (box_w + _GAP), 20, f"… {layout.dp} in all"))
    for pp in range(layout.pp):
        y = top + pp * (height + _GAP)
        parts += _stage(split, pp, y, words, height)
        for dp in range(replicas):
            x = left + dp * (box_w + _GAP)
            parts += _ranks(layout, pp, dp, x, y + (height - box_h) / 2, box_w, box_h)
            middle = y + height / 2
            if dp + 1 < replicas:
                parts.append(_arrow(x + box_w + 2, middle, x + box_w + _GAP - 2, middle))
            if pp + 1 < layout.pp:
                below = y + height + _GAP
                parts.append(_arrow(x + box_w / 2, y + (height + box_h) / 2 + 2, x + box_w / 2,
                                    below + (height - box_h) / 2 - 2))
    return "\n".join([*parts, "</svg>"])


def _stage_texts(split: StageSplit, pp: int) -> list[str]:
    return [f"chunk {chunk}: {held}" if split.vp > 1 else held
            for chunk, held in enumerate(stage_layers(split, pp))]


def _stage(split: StageSplit, pp: int, y: float, width: float, height: float) -> list[str]:
    has_vision = any(len(split.layers("vit", pp, chunk)) for chunk in range(split.vp))
    color = _VISION if has_vision else _LANGUAGE
    name = f"stage {pp}" if split.pp > 1 else "one stage"
    parts = [f'<rect x="2" y="{y}" width="{width}" height="{height}" rx="4" '
             f'fill="{color}"/>', _text(12, y + 18, name, bold=True)]
    parts += [_text(12, y + 36 + 17 * line, text, size=11.5)
              for line, text in enumerate(_stage_texts(split, pp))]
    return parts


def _ranks(layout: Layout, pp: int, dp: int, x: float, y: float, w: float, h: float) -> list[str]:
    parts = [f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="#f4f6f8" '
             f'stroke="{_LINE}"/>']
    for cp in range(layout.cp):
        for tp in range(layout.tp):
            rank = layout.rank(Coordinates(tp=tp, cp=cp, dp=dp, pp=pp))
            at_x, at_y = x + 6 + tp * _SIDE, y + 6 + cp * _SIDE
            parts.append(f'<rect x="{at_x + 1}" y="{at_y + 1}" width="{_SIDE - 2}" '
                         f'height="{_SIDE - 2}" rx="3" fill="#fff" stroke="#aaa"/>')
            parts.append(_text(at_x + _SIDE / 2, at_y + _SIDE / 2 + 4, str(rank),
                               anchor="middle", size=12))
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: float = 13,
          bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}"{weight}>'
            f"{escape(text)}</text>")


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return (f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{_LINE}" stroke-width="1.4" '
            f'marker-start="url(#tip)" marker-end="url(#tip)"/>')
