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


def plot_runs(
    runs: Sequence[History], names: Sequence[str], png: str | Path, title: str = ""
) -> Path:
    """Loss with validation, gradient norm, learning rate, throughput and data wait, over the steps.

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

    figure, axes = pyplot.subplots(
        5, 1, figsize=(9, 12), sharex=True, height_ratios=(4, 2, 2, 2, 1.6), layout="constrained"
    )
    alone = len(runs) == 1
    for run, name, color in zip(runs, names, COLORS, strict=False):
        _draw(axes, run, color, "" if alone else _lines(name, 60))
    loss, norm, rate, speed, wait = axes
    loss.set_ylabel("loss per trained token")
    loss.legend(fontsize=9)
    norm.set_ylabel("gradient norm")
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    speed.set_ylabel("tokens/s\nwithout padding")
    wait.set_ylabel(f"data wait,\n{SHARE}")
    wait.set_xlabel("iteration")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.margins(x=0.01)
    figure.align_ylabels(axes)
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


def _draw(axes, run: History, color: str, name: str) -> None:
    """One run in every panel; where it has no name the legend says what is drawn instead."""
    loss, norm, rate, speed, wait = axes
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
    for axis, key in ((norm, "grad_norm"), (rate, "lr"), (speed, "tokens_per_second")):
        axis.plot(at, [step[key] for step in run.steps], color=color, linewidth=1)
    waits = [  # files of older runs have no such number
        (step["iteration"], 100 * step["data_wait_seconds"] / step["step_seconds"])
        for step in run.steps if "data_wait_seconds" in step
    ]
    wait.plot(*zip(*waits, strict=True) if waits else ((), ()), color=color, linewidth=1)


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
