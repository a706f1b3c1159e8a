"""Draw docs/qkv_tp2.png: where the rows of one layer's weights go when they are cut for TP2.

    python docs/draw_qkv.py [OUT.png]

The sizes are those of `megatron-vl tiny`. Coordinates are tenths of an inch; text
sizes are chosen to be read at a README's width.
"""

from __future__ import annotations

import sys
from pathlib import Path

from draw_architecture import INK, LLM, SOFT, TRAINED, VISION, VOCAB, WEIGHTS, Canvas
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Line

WIDTH, HEIGHT = 122, 93
TP, HEADS, GROUPS, HEAD_DIM, HIDDEN, FFN = 2, 4, 2, 32, 128, 384
FILLS = {"q": LLM, "k": VISION, "v": VOCAB, "gate": TRAINED, "up": "#d3ebdb"}
CUT = "#c0392b"

Block = tuple[str, int]  # rows of a published tensor: its name, and which part of it
Sides = dict[Block, tuple[float, float]]  # bottom and top of the box that shows them


class Sheet(Canvas):
    def __init__(self) -> None:
        super().__init__()
        self.figure.set_size_inches(WIDTH / 10, HEIGHT / 10)
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))

    def rows(self, x, top, width, blocks: list[Block], size, *, height=4.2, first=0) -> Sides:
        """A tensor, blocks of `size` rows below one another; `first` is the number of its first."""
        sides = {}
        for number, (kind, part) in enumerate(blocks):
            y, row = top - (number + 1) * height, first + number * size
            self.box(x, y, width, height, fill=FILLS[kind], edge="white", line=1.8, round_=0.3)
            name = f"{kind}{part}" if kind in "qkv" else f"{kind} {part}"
            self.text(x + 1.2, y + height / 2, name, at="left", size=11.5, weight="bold")
            self.text(x + width - 1.2, y + height / 2, f"{row}:{row + size}", at="right")
            sides[kind, part] = y, y + height
        tall = len(blocks) * height
        self.box(x, top - tall, width, tall, fill="none", edge=INK, line=1.4, round_=0.3, zorder=3)
        return sides

    def bands(self, left, right, before: Sides, after: Sides, *slices: list[Block]) -> None:
        """Slices: blocks that are neighbours on both sides travel together."""
        middle = (left + right) / 2
        for blocks in slices:
            (a, b), (c, d) = ((min(side[one][0] for one in blocks) + 0.25,
                               max(side[one][1] for one in blocks) - 0.25)
                              for side in (before, after))
            path = ((left, b), (middle, b), (middle, d), (right, d),
                    (right, c), (middle, c), (middle, a), (left, a), (left, b))
            turns = [Line.CURVE4] * 3 + [Line.LINETO]
            self.axes.add_patch(PathPatch(
                Line(path, [Line.MOVETO, *turns, *turns]), facecolor=FILLS[blocks[0][0]],
                edgecolor="none", alpha=0.55, zorder=0.5,
            ))

    def label(self, x, y, name, words, *, at="left", size=10.5) -> None:
        self.text(x, y + 1.3, name, at=at, size=size, weight="bold")
        self.text(x, y - 1.4, words, at=at, color=SOFT)

    def cut(self, xs, ys) -> None:
        self.axes.plot(xs, ys, color=CUT, linewidth=1.8, dashes=(4, 2.5), zorder=4)

    def panel(self, x, y, width, height, title) -> None:
        self.box(x, y, width, height, fill="#fbfcfd", edge=SOFT, zorder=0.1)
        self.text(x + width / 2, y + height - 3, title, size=12, weight="bold")


def draw_qkv(sheet):
    left, middle, right, width = 14.5, 53, 86, 15.5
    begin = top = 78
    before, height, per_group = {}, 4.2, HEADS // GROUPS
    for kind, count in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
        before |= sheet.rows(left, top, width, [(kind, one) for one in range(count)], HEAD_DIM)
        sheet.label(left - 1.3, top - count * height / 2, f"{kind}_proj",
                    f"[{count * HEAD_DIM}, {HIDDEN}]", at="right", size=11.5)
        top -= count * height + 2.6
    top, gap = begin, 5.2
    for group in range(GROUPS):
        queries = [("q", group * per_group + one) for one in range(per_group)]
        key, value = ("k", group), ("v", group)
        blocks = [*queries, key, value]
        rows = len(blocks) * HEAD_DIM
        whole = sheet.rows(middle, top, width, blocks, HEAD_DIM, first=group * rows)
        part = sheet.rows(right, top, width, blocks, HEAD_DIM)
        slices = queries, [key], [value]
        sheet.bands(left + width, middle, before, whole, *slices)
        sheet.bands(middle + width, right, whole, part, *slices)
        y = top - len(blocks) * height / 2
        sheet.text((middle + width + right) / 2, top - len(queries) * height / 2, f"group {group}",
                   size=11.5, weight="bold")
        sheet.text(right + width + 1.5, y + 2.9, f"mp_rank_{group:02d}", at="left", size=12.5,
                   weight="bold")
        sheet.text(right + width + 1.5, y, "model_optim_rng.pt", at="left", size=10)
        sheet.text(right + width + 1.5, y - 2.7, f"[{rows}, {HIDDEN}]", at="left", color=SOFT)
        top -= len(blocks) * height + gap
        if group + 1 < GROUPS:
            sheet.cut((middle - 3, WIDTH - 2), (top + gap / 2,) * 2)
            sheet.text((middle + width + right) / 2, top + gap / 2 + 1.5, "cut for TP2", color=CUT)
    for x, head, words in (
        (left, "published", "three tensors"),
        (middle, "linear_qkv", f"[{(HEADS + 2 * GROUPS) * HEAD_DIM}, {HIDDEN}], by group"),
        (right, "a file a rank", "half of linear_qkv each"),
    ):
        sheet.text(x + width / 2, begin + 4.6, head, size=12.5, weight="bold", color=WEIGHTS)
        sheet.text(x + width / 2, begin + 1.9, words, color=SOFT)


def draw_gate_up(sheet):
    sheet.panel(1, 5, 66, 27, "gate_proj, up_proj: a part of both for each rank")
    left, right, width, part = 13.5, 40, 15, FFN // TP
    before, top, height = {}, 26.5, 3.9
    for kind in ("gate", "up"):
        before |= sheet.rows(left, top, width, [(kind, rank) for rank in range(TP)], part,
                             height=height)
        sheet.label(left - 1.3, top - height, f"{kind}_proj", f"[{FFN}, {HIDDEN}]", at="right")
        top -= TP * height + 2.6
    top = 26.5
    for rank in range(TP):
        blocks = [("gate", rank), ("up", rank)]
        after = sheet.rows(right, top, width, blocks, part, height=height)
        sheet.bands(left + width, right, before, after, *([one] for one in blocks))
        sheet.label(right + width + 1, top - height, f"mp_rank_{rank:02d}", "linear_fc1")
        top -= 2 * height + 2.6


def draw_columns(sheet):
    sheet.panel(69, 5, 52, 27, "o_proj, down_proj: cut on columns")
    left, right, width, height, gap = 81, 102, 12, 5.4, 1.6
    for number, (name, inside, what, kind, columns, parts) in enumerate((
        ("o_proj", "linear_proj", "by head", "q", HEADS * HEAD_DIM, HEADS),
        ("down_proj", "linear_fc2", "as gate, up", "gate", FFN, TP),
    )):
        y = 18.8 - number * 9.9
        sheet.label(left - 1.3, y + height / 2, name, f"[{HIDDEN}, {columns}]", at="right")
        strip = width / parts
        for part in range(parts):
            rank = part * TP // parts
            for x in (left + part * strip, right + part * strip + rank * gap):
                sheet.box(x, y, strip, height, fill=FILLS[kind], edge="white", line=1.8,
                          round_=0.3)
                sheet.text(x + strip / 2, y + height / 2, f"{part}", size=11.5, weight="bold")
        sheet.box(left, y, width, height, fill="none", edge=INK, line=1.4, round_=0.3, zorder=3)
        sheet.cut((left + width / 2,) * 2, (y - 0.6, y + height + 0.8))
        sheet.arrow((left + width + 1, y + height / 2), (right - 1, y + height / 2))
        for rank in range(TP):
            sheet.box(right + rank * (width / TP + gap), y, width / TP, height, fill="none",
                      edge=INK, line=1.4, round_=0.3, zorder=3)
        for x, words in ((left + width / 2, what), (right + (width + gap) / 2, inside)):
            sheet.text(x, y - 2, words, color=SOFT)
    for rank in range(TP):
        sheet.text(right + width / TP / 2 + rank * (width / TP + gap), 25.6, f"rank {rank}",
                   weight="bold")


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("qkv_tp2.png")
    sheet = Sheet()
    sheet.text(WIDTH / 2, 89, "One language layer at TP2: where its rows and columns go", size=14,
               weight="bold")
    draw_qkv(sheet)
    draw_gate_up(sheet)
    draw_columns(sheet)
    sheet.text(
        WIDTH / 2, 2, "A slice goes straight from file to file: linear_qkv is never put together "
        "whole. Back to Hugging Face the slices are reversed.", size=11, color=WEIGHTS,
        style="italic",
    )
    sheet.figure.savefig(out, dpi=150, facecolor="white", metadata={"Software": None})
    print(out)


if __name__ == "__main__":
    main()
