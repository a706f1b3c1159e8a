"""How samples lie, as pictures: tokens, patches, images, their sizes, and how rows fill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_vl.data.lint.look import Look
from megatron_vl.models.media import IMAGE, VIDEO

_LONG_TAIL = 8  # times the median that the most is: above, a scale of logarithms shows more
_MANY = 100  # the same of the counts of two bars
_BLUE, _GREEN, _ORANGE, _GRAY = "#08519c", "#31a354", "#d94801", "#bdbdbd"


def draw(looks: Sequence[Look], numbers: dict, folder: Path) -> dict[str, str]:
    """Write the pictures there is data for into `folder`; their captions by the files' names."""
    import matplotlib

    matplotlib.use("Agg")
    known = [look for look in looks if look.tokens]
    shown = [look.patches for look in known if look.media]
    readable = [look for look in looks if look.answers]
    captions = {}

    def picture(name: str, caption: str, paint, *values) -> None:
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
        paint(axis, *values)
        figure.savefig(folder / name, dpi=110)
        pyplot.close(figure)
        captions[name] = caption

    if known:
        lengths = [look.tokens for look in known]
        picture("tokens.png", "tokens of a sample", _lengths, lengths,
                [look.trained for look in known], numbers["seq_length"])
    if shown:
        picture("patches.png", "patches of a sample with images or videos", _patches, shown,
                numbers["max_patches_per_row"])
    if readable:
        picture("images.png", "images and videos of a sample", _media, readable)
    media = [m for look in readable for m in look.media]
    if media:
        picture("sizes.png", "sizes of images and videos; a larger point: more have this size",
                _sizes, media)
    if any(one["rows"] for one in numbers.get("forecast", ())):
        limit = numbers["max_patches_per_row"]
        within = "" if limit is None else f"; at most {limit:,} patches in one"
        picture("rows.png", f"what of a row samples fill, and what is padding{within}", _fill,
                numbers)
    return captions


def _lengths(axis, tokens: list[int], trained: list[int], seq_length: int) -> None:
    edges = _edges(axis, [*tokens, *trained])
    axis.hist(tokens, edges, color=_BLUE, alpha=0.85, label="tokens")
    axis.hist(trained, edges, color=_GREEN, alpha=0.75, label="trained tokens")
    _line(axis, seq_length, f"row of {seq_length:,}", edges)
    axis.legend(fontsize=8)
    _named(axis, "tokens", "samples")


def _patches(axis, patches: list[int], limit: int | None) -> None:
    edges = _edges(axis, patches)
    axis.hist(patches, edges, color=_BLUE, alpha=0.85)
    if limit is not None:
        _line(axis, limit, f"row of {limit:,}", edges)
        axis.legend(fontsize=8)
    _named(axis, "patches", "samples")


def _media(axis, looks: list[Look]) -> None:
    """Bars of whole numbers: how many samples have so many."""
    kinds = [kind for kind in (IMAGE, VIDEO) if any(look.count(kind) for look in looks)] or [IMAGE]
    most = max(look.count(kind) for look in looks for kind in kinds)
    heights = []
    for i, kind in enumerate(kinds):
        counts = Counter(look.count(kind) for look in looks)
        width = 0.8 / len(kinds)
        at = [n + (i - (len(kinds) - 1) / 2) * width for n in sorted(counts)]
        bars = axis.bar(at, [counts[n] for n in sorted(counts)], width, alpha=0.85,
                        color=(_BLUE, _ORANGE)[i], label=f"{kind}s")
        if most <= 12:
            axis.bar_label(bars, fontsize=7, fmt="{:,.0f}")
        heights += counts.values()
    if max(heights) > _MANY * min(heights):
        axis.set_yscale("log")
    if most <= 30:
        axis.set_xticks(range(most + 1))
    axis.legend(fontsize=8)
    axis.margins(y=0.12)
    _named(axis, "in one sample", "samples")


def _sizes(axis, media: list) -> None:
    """Width against height, a point the larger the more have this size."""
    sides = [side for m in media for side in (m.width, m.height)]
    wide = max(sides) > _LONG_TAIL * np.median(sides) or max(sides) > 30 * min(sides)
    for kind, color in ((IMAGE, _BLUE), (VIDEO, _ORANGE)):
        sizes = Counter((m.width, m.height) for m in media if m.kind == kind)
        if not sizes:
            continue
        areas = 12 + 240 * np.sqrt(np.array(list(sizes.values())) / len(media))
        axis.scatter(*zip(*sizes, strict=True), s=areas, color=color, alpha=0.45,
                     edgecolors="white", linewidths=0.5, label=f"{sum(sizes.values()):,} {kind}s")
    if wide:
        axis.set_xscale("log")
        axis.set_yscale("log")
    low, high = min(sides) / 1.25, max(sides) * 1.15
    low = low if wide else 0
    axis.set_xlim(low, high)
    axis.set_ylim(low, high)
    axis.plot((low, high), (low, high), color=_GRAY, linewidth=0.8, zorder=0)
    axis.legend(fontsize=8, markerscale=0.6)
    _named(axis, "width, pixels", "height, pixels")


def _fill(axis, numbers: dict) -> None:
    limit = numbers["max_patches_per_row"]
    chosen = [one for one in numbers["forecast"] if one["max_patches"] == limit and one["rows"]]
    at = range(len(chosen))
    fill = [100 * one["fill"] for one in chosen]
    axis.bar(at, fill, color=_BLUE, alpha=0.85, label="samples, packed")
    axis.bar(at, [100 - value for value in fill], bottom=fill, color=_GRAY, alpha=0.6,
             label="padding")
    axis.plot(at, [100 * one["alone"] for one in chosen], "o", color=_ORANGE, markersize=5,
              label="samples, one a row")
    for i, one in enumerate(chosen):
        lost = f"\n{one['lost']:.1%} lost" if one["lost"] else ""
        axis.text(i, 103, f"{fill[i]:.1f}%{lost}", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(at, [f"{one['seq_length']:,}" for one in chosen])
    axis.set_ylim(0, 118)
    axis.set_yticks(range(0, 101, 25))
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    _named(axis, "tokens of a row", "% of them")


def _edges(axis, values: Sequence[int]) -> np.ndarray:
    """Bounds of bars, on the scale that shows them; the axis is set to it."""
    low, high = min(values), max(values)
    if low > 0 and high > _LONG_TAIL * np.median(values):
        axis.set_xscale("log")
        edges = np.geomspace(low, high + 1, 50)
        # Bars between whole numbers would be gaps.
        return np.unique(np.ceil(edges)) - 0.5
    step = max(1, -(-(high - low + 1) // 50))
    return np.arange(low, high + 1 + step, step) - 0.5


def _line(axis, value: int, label: str, edges: np.ndarray) -> None:
    """A bound, where it is near enough not to squeeze everything else."""
    near = value <= 2 * edges[-1]
    if near:
        axis.axvline(value, color=_ORANGE, linewidth=1.4, label=label)
    else:
        axis.plot([], [], color=_ORANGE, linewidth=1.4, label=f"{label}, far to the right")


def _plain_ticks(axis) -> None:
    """1,000 and not 10^3."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        subs = (1, 2, 5) if high < 300 * low else (1, 3) if high < 30_000 * low else (1,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_formatter(NullFormatter())
    elif not isinstance(axis.get_major_formatter(), ScalarFormatter):
        return  # ticks with words of their own
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _named(axis, below: str, beside: str) -> None:
    axis.set_xlabel(below)
    axis.set_ylabel(beside)
    _plain_ticks(axis.xaxis)
    _plain_ticks(axis.yaxis)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
