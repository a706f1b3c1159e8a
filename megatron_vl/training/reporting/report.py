"""Runs' numbers as a picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.outputs import replacing_file
from megatron_vl.training.reporting.history import History

# Told apart by people who see few colours too (Okabe and Ito); the first is for one run alone.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
SHARE = "% of a step"
ACCURACIES = {"token_accuracy": "token accuracy", "exact_accuracy": "exact answers"}
LOADS = {"expert_load_max": "busiest expert", "expert_load_min": "idlest expert"}
_PANELS = {"loss": 4, "accuracy": 2, "norm": 2, "rate": 2, "speed": 2, "load": 2,
           "wait": 1.6}  # heights
_EPOCH_TICKS = 8


def plot_runs(
    runs: Sequence[History], names: Sequence[str], png: str | Path, title: str = ""
) -> Path:
    """Loss with validation, its accuracies, gradient norm, learning rate, throughput, load of the
    busiest and the idlest expert, and data wait, over the steps; of one run alone with the epochs
    above.

    Several runs lie over each other, a color each.

    Raises:
        InputError: a run without a step, more runs than there are colors, or see
            `replacing_file`.
    """
    if len(runs) > len(COLORS):
        raise InputError(f"{len(runs)} runs are too many for one picture; give {len(COLORS)}.")
    for run in runs:
        if not run.steps:
            raise InputError(f"{run.file} holds no training step yet; train first.")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    panels = dict(_PANELS)
    if not any(_having(run, name) for run in runs for name in ACCURACIES):
        del panels["accuracy"]
    if not any("expert_load_max" in step for run in runs for step in run.steps):
        del panels["load"]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, sum(panels.values()) + 0.4), sharex=True,
        height_ratios=list(panels.values()), layout="constrained",
    )
    axes = dict(zip(panels, axes, strict=True))
    alone = len(runs) == 1
    for run, name, color in zip(runs, names, COLORS, strict=False):
        _draw(axes, run, color, "" if alone else _lines(name, 60))
    for name, label in (
        ("loss", "loss per trained token"), ("accuracy", "validation\naccuracy"),
        ("norm", "gradient norm"), ("rate", "learning rate"),
        ("speed", "tokens/s\nwithout padding"), ("wait", f"data wait,\n{SHARE}"),
        ("load", "expert's load\nover the mean"),
    ):
        if name in axes:
            axes[name].set_ylabel(label)
    axes["loss"].legend(fontsize=9)
    if "accuracy" in axes:
        axes["accuracy"].yaxis.set_major_formatter(PercentFormatter(1.0))
        axes["accuracy"].legend(fontsize=9)
    if "load" in axes:
        axes["load"].legend(fontsize=9)
    if alone:
        _epochs(axes["loss"], runs[0].steps)
    axes["rate"].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes["wait"].set_xlabel("iteration")
    for axis in axes.values():
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.margins(x=0.01)
    if "accuracy" in axes:
        axes["accuracy"].set_ylim(top=1.05)
    figure.align_ylabels(list(axes.values()))
    figure.suptitle("\n".join(_lines(one, 85) for one in ([title] if title else names)))
    try:
        with replacing_file(Path(png)) as pending:
            figure.savefig(pending, dpi=110)
    finally:
        pyplot.close(figure)
    return Path(png)


def _lines(text: str, width: int) -> str:
    """A text that is wider than a picture, in lines that are not."""
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False)) or text


def _having(run: History, name: str) -> list[dict]:
    """The validations that have a figure, which older runs' have not."""
    return [one for one in run.validations if name in one]


def _draw(axes: dict, run: History, color: str, name: str) -> None:
    """One run in every panel; where it has no name the legend says what is drawn instead."""
    loss = axes["loss"]
    at = [step["iteration"] for step in run.steps]
    values = [step["loss"] for step in run.steps]
    loss.plot(at, values, color=color, alpha=0.35, linewidth=0.8,
              label=None if name else "each step")
    loss.plot(at, smoothed(values), color=color, linewidth=1.8,
              label=name or "mean of the steps around")
    if run.validations:
        loss.plot(
            [one["iteration"] for one in run.validations],
            [one["validation_loss"] for one in run.validations], "o--", color=color, markersize=5,
            linewidth=1, markerfacecolor="white",
            label=f"{name}, validation" if name else "validation",
        )
    for key, line in (("token_accuracy", "o:"), ("exact_accuracy", "o-")):
        if having := _having(run, key):
            axes["accuracy"].plot(
                [one["iteration"] for one in having], [one[key] for one in having], line,
                color=color, markersize=5, linewidth=1, markerfacecolor="white",
                label=f"{name}, {ACCURACIES[key]}" if name else ACCURACIES[key],
            )
    for panel, key in (("norm", "grad_norm"), ("rate", "lr"), ("speed", "tokens_per_second")):
        axes[panel].plot(at, [step[key] for step in run.steps], color=color, linewidth=1)
    if "load" in axes:
        loads = [step for step in run.steps if "expert_load_max" in step]
        for (key, title), line in zip(LOADS.items(), ("-", "--"), strict=True):
            axes["load"].plot(
                [step["iteration"] for step in loads], [step[key] for step in loads], line,
                color=color, linewidth=1, label=f"{name}, {title}" if name else title,
            )
    waits = [  # files of older runs have no such number
        (step["iteration"], 100 * step["data_wait_seconds"] / step["step_seconds"])
        for step in run.steps if "data_wait_seconds" in step
    ]
    axes["wait"].plot(*zip(*waits, strict=True) if waits else ((), ()), color=color, linewidth=1)


def _epochs(axis, steps: list[dict]) -> None:
    """Above a panel, how often the data had been read."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    having = [step for step in steps if step.get("epoch") is not None]
    if len(having) < 2:
        return
    epochs = [step["epoch"] for step in having]
    ticks = MaxNLocator(_EPOCH_TICKS, steps=(1, 2, 5, 10)).tick_values(epochs[0], epochs[-1])
    ticks = [one for one in ticks if epochs[0] <= one <= epochs[-1]]
    above = axis.secondary_xaxis("top")
    above.set_xticks(np.interp(ticks, epochs, [step["iteration"] for step in having]),
                     [f"{one:g}" for one in ticks])
    above.set_xlabel("epoch")


def smoothed(values: list[float]) -> list[float]:
    """Mean of the steps around each, as many before it as after it, so that it does not lag.

    Over a tenth of the run, at most 41 steps, and fewer towards both ends. A value that is not
    finite, as of a step that was skipped, is left out.
    """
    reach, last = min(20, len(values) // 20), len(values) - 1
    out = []
    for at in range(len(values)):
        near = min(reach, at, last - at)
        finite = [one for one in values[at - near : at + near + 1] if math.isfinite(one)]
        out.append(sum(finite) / len(finite) if finite else math.nan)
    return out
