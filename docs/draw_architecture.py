"""Draw docs/architecture.png: a small Qwen2-VL spread over TP2 x PP2, and what flows through it.

    python docs/draw_architecture.py [OUT.png]

Coordinates are tenths of an inch; text sizes are chosen to be read at a README's width.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path as Line

WIDTH, HEIGHT = 122, 90
INK, SOFT = "#22303c", "#5b6b7a"
VISION, LLM, VOCAB, WHOLE = "#f6c98f", "#a9cbee", "#c9b8e8", "#e3e7ea"
DATA, WEIGHTS = "#d9730d", "#2e7d4f"
TEXT, TRAINED, PADDING = "#dfe6ec", "#8fd0a5", "#ffffff"


class Canvas:
    def __init__(self) -> None:
        self.figure = pyplot.figure(figsize=(WIDTH / 10, HEIGHT / 10))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axes.axis("off")

    def text(self, x, y, words, *, size=10.5, color=INK, at="center", weight="normal", **more):
        if "\n" not in words and "rotation" not in more:
            y, more["va"] = y - size / 28, "baseline"  # words with and without tails stand level
        self.axes.text(
            x, y, words, fontsize=size, color=color, ha=at, weight=weight, linespacing=1.3,
            **{"va": "center", **more},
        )

    def box(self, x, y, width, height, *, fill="white", edge=SOFT, line=1.1, round_=0.8, **more):
        self.axes.add_patch(FancyBboxPatch(
            (x, y), width, height, boxstyle=f"round,pad=0,rounding_size={round_}", facecolor=fill,
            edgecolor=edge, linewidth=line, **more,
        ))

    def arrow(self, start, end, *, color=SOFT, width=1.6, style="-|>", **more):
        self.axes.add_patch(FancyArrowPatch(
            start, end, arrowstyle=style, mutation_scale=13, color=color, linewidth=width,
            shrinkA=0, shrinkB=0, **more,
        ))

    def elbow(self, *points, color=SOFT, width=1.6):
        """A line with corners and an arrow head at its end."""
        self.axes.add_patch(PathPatch(
            Line(points[:-1]), facecolor="none", edgecolor=color, linewidth=width,
            joinstyle="round",
        ))
        self.arrow(points[-2], points[-1], color=color, width=width)


# ---- the model --------------------------------------------------------------------------------


def bar(canvas, x, y, width, label, fill):
    """One layer over both ranks of a stage: two words are two halves, one is a whole copy each."""
    height, words = 3.5, label.split("|")
    if len(words) == 1:
        canvas.box(x, y, width, height, fill=fill, edge="none", round_=0.5)
        canvas.text(x + width / 2, y + height / 2, label)
        return
    half = (width - 0.8) / 2
    for number, word in enumerate(words):
        left = x + number * (half + 0.8)
        canvas.box(left, y, half, height, fill=fill, edge="none", round_=0.5)
        canvas.text(left + half / 2, y + height / 2, word)


def stage(canvas, x, title, subtitle, ranks, layers):
    """A pipeline stage of two tensor-parallel ranks; answers the height of every layer's bar."""
    width, top = 27, 81
    canvas.box(x, 29, width, top - 29, fill="#fbfcfd", edge=INK, line=1.5, round_=1.2)
    canvas.text(x + width / 2, top - 2.6, title, size=12.5, weight="bold")
    canvas.text(x + width / 2, top - 5.7, subtitle, color=SOFT)
    inner = (width - 3.2) / 2
    for number, rank in enumerate(ranks):
        left = x + 1.2 + number * (inner + 0.8)
        canvas.box(left, 39.8, inner, 33.6, fill="#eef2f5", edge="none")
        canvas.text(left + inner / 2, 71.4, rank, weight="bold")
    places, y = {}, 65.2
    for label, fill in layers:
        bar(canvas, x + 2, y, width - 4, label, fill)
        places[label] = y + 1.75
        y -= 4.75
    return places


def draw_model(canvas):
    left, right = 34, 68
    first = stage(
        canvas, left, "pipeline stage 0", "vision, 1 of 4 language layers",
        ("rank 0 · tp 0", "rank 1 · tp 1"),
        (("patch embedding", WHOLE), ("vision|layer 0", VISION), ("vision|layer 1", VISION),
         ("patch|merger", VISION), ("word|embedding", VOCAB), ("language|layer 0", LLM)),
    )
    second = stage(
        canvas, right, "pipeline stage 1", "3 of 4 language layers",
        ("rank 2 · tp 0", "rank 3 · tp 1"),
        (("language|layer 1", LLM), ("language|layer 2", LLM), ("language|layer 3", LLM),
         ("final norm", WHOLE), ("output|head", VOCAB), ("loss|per token", VOCAB)),
    )
    for x, words in (
        (left, "Coloured layers are cut in two,\ngrey ones whole on both ranks.\n"
               "Image embeddings take the\nplaces of their tokens."),
        (right, "Logits only where a token\nis trained; the mean is over\n"
                "all microbatches and all\ndata-parallel ranks."),
    ):
        canvas.text(x + 13.5, 34.4, words, size=9.5, color=SOFT)
    y, end = first["language|layer 0"], second["language|layer 1"]
    gap = (left + 27 + right) / 2
    canvas.elbow((left + 25.2, y), (gap, y), (gap, end), (right + 1.8, end), color="#2b6cb0")
    canvas.text(gap - 1.6, 59, "hidden states", color="#2b6cb0", rotation=90)
    canvas.text(gap + 1.6, 59, "gradients return", color=SOFT, rotation=90)
    tied = first["word|embedding"]
    canvas.arrow((left + 25.2, tied), (right + 1.8, tied), color="#6b4fb3", style="<|-|>",
                 linestyle=(0, (3, 2)))
    canvas.text(gap + 1.9, tied + 1.3, "tied", color="#6b4fb3", size=9.5)
    return first


# ---- data, on the left and below --------------------------------------------------------------


def draw_data(canvas, first):
    x, width = 2, 26
    canvas.text(x + width / 2, 85.5, "DATA", size=13, weight="bold", color=DATA)
    for y, height, head, words in (
        (73, 8, "raw JSON and images", "LLaVA's format"),
        (58.5, 8, "WebDataset shards", "the images' own bytes, indexed"),
        (29, 22.5, "encode, pack, decode", None),
    ):
        canvas.box(x, y, width, height, edge=DATA)
        canvas.text(x + width / 2, y + height - 2.8, head, weight="bold", size=11)
        if words:
            canvas.text(x + width / 2, y + 2.7, words, color=SOFT)
    for number, (head, words) in enumerate((
        ("1", "text and image sizes to\nintegers; no pixel yet"),
        ("2", "samples that fill a row\nare put together"),
        ("3", "only now, only on stage 0:\nits images to patches"),
    )):
        y = 43.2 - number * 5.6
        canvas.text(x + 2.6, y, head, size=12, weight="bold", color=DATA)
        canvas.text(x + 4.8, y, words, at="left", size=10)
    for start, end, words in ((73, 66.5, "megatron-vl prepare"), (58.5, 51.5, "energon loader")):
        canvas.arrow((x + 4, start), (x + 4, end), color=DATA)
        canvas.text(x + 6, (start + end) / 2, words, at="left", family="monospace", size=10)
    draw_row(canvas)
    canvas.arrow((x + 4, 29), (x + 4, 17.2), color=DATA)
    # Pixels go up to the first layer of stage 0; integers to every stage.
    y = first["patch embedding"]
    canvas.elbow((31, 17.2), (31, y), (35.8, y), color=DATA, width=2.6)
    canvas.text(29.9, 62, "pixel patches", color=DATA, rotation=90, weight="bold")
    for stage_x in (47.5, 81.5):
        canvas.arrow((stage_x, 17.2), (stage_x, 29), color=INK)
        canvas.text(stage_x + 1.2, 23.6, "tokens, labels, positions,\nsegment bounds", at="left",
                    size=10)
    canvas.text(32.4, 23.6, "to stage 0\nonly", at="left", color=DATA, size=10)


def draw_row(canvas):
    """One packed row: two samples and padding, cell after cell."""
    left, y, height, scale = 2, 9.4, 5.2, 117.5 / 101
    cells = (
        (9, TEXT, "text"), (13, VISION, "image 1"), (11, TEXT, "question"), (7, TRAINED, "answer"),
        (8, TEXT, "text"), (19, VISION, "image 2"), (12, TEXT, "question"), (9, TRAINED, "answer"),
        (13, PADDING, "padding"),
    )
    canvas.box(0.8, 1, 120.2, 16.2, fill="#fffaf4", edge=DATA, line=1.2)
    x, bounds = left, [left]
    for number, (size, fill, label) in enumerate(cells):
        width = size * scale
        canvas.box(x + 0.15, y, width - 0.3, height, fill=fill, edge=SOFT, line=0.7, round_=0.4)
        canvas.text(x + width / 2, y + height / 2, label)
        x += width
        if number in (3, 7, 8):
            bounds.append(x)
    for bound in bounds:
        canvas.axes.plot([bound, bound], [y - 1.4, y + height + 0.8], color=INK, linewidth=1.6)
    names = ("sample A, a segment", "sample B, a segment", "its own segment")
    for begin, end, name in zip(bounds, bounds[1:], names, strict=False):
        canvas.arrow((begin + 0.4, y - 1.5), (end - 0.4, y - 1.5), style="<->", width=1)
        canvas.text((begin + end) / 2, y - 3.2, name, size=9.5, color=SOFT)
    canvas.text(61, 3.0, "One packed row: attention stays inside a segment; "
                "only the green tokens are trained", size=11, weight="bold")


# ---- weights, on the right --------------------------------------------------------------------


def draw_weights(canvas):
    x, width = 99.5, 21.5
    middle = x + width / 2
    canvas.text(middle, 85.5, "WEIGHTS", size=13, weight="bold", color=WEIGHTS)
    steps = (
        (75, 6.5, "Hugging Face directory", "safetensors, tokenizer", "white"),
        (63.2, 6.5, "a file a rank", "mp_rank_01_000, ..", "white"),
        (42.2, 6.5, "iter_0000100/", "loads in any layout", "white"),
        (30.4, 6.5, "Hugging Face directory", "loads in transformers", "white"),
    )
    for y, height, head, words, fill in steps:
        canvas.box(x, y, width, height, edge=WEIGHTS, fill=fill)
        canvas.text(middle, y + height - 2.1, head, weight="bold", size=10.5)
        canvas.text(middle, y + 2.0, words, color=SOFT, size=10)
    for top, bottom in ((75, 69.7), (42.2, 36.9)):
        canvas.arrow((x + 4, top), (x + 4, bottom), color=WEIGHTS)
        canvas.text(x + 5.6, (top + bottom) / 2, "megatron-vl convert", at="left",
                    family="monospace", size=9.5)
    canvas.arrow((x, 66.4), (95, 66.4), color=WEIGHTS)
    canvas.arrow((95, 45.4), (x, 45.4), color=WEIGHTS)
    canvas.text(middle, 56, "one plan of slices;\nevery tensor comes back\nbit for bit", size=10.5,
                color=WEIGHTS, style="italic")


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("architecture.png")
    canvas = Canvas()
    canvas.text(64.5, 85.5, "One model on four processes: TP2 x PP2", size=14, weight="bold")
    draw_data(canvas, draw_model(canvas))
    draw_weights(canvas)
    canvas.figure.savefig(out, dpi=150, facecolor="white", metadata={"Software": None})
    print(out)


if __name__ == "__main__":
    main()
