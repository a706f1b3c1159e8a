"""The load of every expert as a map, layers by experts, and in words."""

from __future__ import annotations

import io
import math

from megatron_vl.pages import escape, picture
from megatron_vl.training.reporting.history import History, total

_MOST = 4.0  # times the mean, from where on colors no longer differ; one over it alike
_CELL = 0.28  # inches of a layer; less where there are many
_IDLE = "#009e73"  # which is on the way between no two loads


def experts_part(run: History) -> list[str]:
    """Of a page about a run: the latest of its lines on experts; nothing where there is none."""
    if not run.experts:
        return []
    latest, told = run.experts[-1], ""
    if any("dropped_tokens" in step for step in run.steps):
        dropped, sent = (total(run.steps, f"{name}_tokens") for name in ("dropped", "routed"))
        told = (f" In the whole run, full experts dropped {dropped:,.0f} of {sent:,.0f} tokens "
                f"that were sent to them ({dropped / max(1, sent):.1%}).")
    return [
        "<h2>load of the experts</h2>\n", f"<p>{escape(in_words(latest) + told)}</p>\n",
        picture(load_map(latest["tokens"]), "tokens of every expert of every layer, over the mean"),
    ]


def in_words(record: dict) -> str:
    """Which steps a line on experts is about, the busiest of them, and those without a token."""
    loads, last, steps = loads_of(record["tokens"]), record["iteration"], record["steps"]
    load, layer, expert = max(
        ((one, layer, expert) for layer, row in enumerate(loads) for expert, one in enumerate(row)),
        key=lambda found: found[0],
    )
    idle = sum(row.count(0.0) for row in loads)
    of = f"Iteration {last:,}" if steps == 1 else f"Iterations {last - steps + 1:,} to {last:,}"
    return (f"{of}: the busiest is expert {expert} of layer {layer} with {load:.2f} times the mean "
            f"of its layer; {idle:,} of {sum(map(len, loads)):,} experts got no token.")


def loads_of(tokens: list[list[int]]) -> list[list[float]]:
    """Of every expert, its tokens over the mean of its layer."""
    return [[count * len(layer) / max(1, sum(layer)) for count in layer] for layer in tokens]


def load_map(tokens: list[list[int]]) -> bytes:
    """A PNG: a row a layer, a column an expert, the mean in white; both count from 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    # On a scale of factors, where half the mean is as far from it as twice.
    colors = [[math.log2(load) if load else math.nan for load in row] for row in loads_of(tokens)]
    most = math.log2(_MOST)
    figure, axes = pyplot.subplots(
        figsize=(9, min(9.0, 1.4 + max(_CELL * len(tokens), 1.6))), layout="constrained"
    )
    axes.set_facecolor(_IDLE)  # shows where there is no number
    drawn = axes.imshow(colors, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto",
                        interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    bar = figure.colorbar(drawn, extend="both", ticks=[-2, -1, 0, 1, 2], pad=0.01)
    bar.ax.set_yticklabels(["1/4", "1/2", "mean", "2x", "4x"])
    bar.set_label("over the layer's mean")
    if any(0 in layer for layer in tokens):
        figure.legend(handles=[Patch(color=_IDLE, label="no token")], loc="outside upper right",
                      fontsize=9)
    png = io.BytesIO()
    try:
        figure.savefig(png, format="png", dpi=110)
    finally:
        pyplot.close(figure)
    return png.getvalue()
