"""A run's numbers as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_vl.errors import InputError


def read_metrics(jsonl: str | Path) -> tuple[list[dict], list[dict]]:
    """(training steps, validations) of a metrics file, each step once: a resumed run repeats steps,
    the later line counts.

    Raises:
        InputError: no such file, or a line that is no JSON object.
    """
    path = Path(jsonl)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a run's metrics.jsonl or its directory.")
    kinds: dict[str, dict[int, dict]] = {"train": {}, "validation": {}}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            kinds[record["kind"]][record["iteration"]] = record
        except (json.JSONDecodeError, KeyError, TypeError):
            raise InputError(f"{path}:{number} is not a line of run metrics.") from None
    return tuple([steps[i] for i in sorted(steps)] for steps in kinds.values())


def plot_run(jsonl: str | Path, png: str | Path, title: str = "") -> Path:
    """Loss with validation, gradient norm with learning rate, and throughput, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, validations = read_metrics(jsonl)
    if not steps:
        raise InputError(f"{jsonl} holds no training step yet; train first.")
    at = [step["iteration"] for step in steps]
    figure, (loss, norm, speed) = pyplot.subplots(
        3, 1, figsize=(9, 9), sharex=True, height_ratios=(3, 2, 2), layout="constrained"
    )
    values = [step["loss"] for step in steps]
    loss.plot(at, values, color="#9ecae1", linewidth=0.8, label="each step")
    loss.plot(at, smoothed(values), color="#08519c", linewidth=1.8, label="smoothed")
    if validations:
        loss.plot(
            [v["iteration"] for v in validations], [v["validation_loss"] for v in validations],
            "o-", color="#d94801", markersize=4, label="validation",
        )
    loss.set_ylabel("loss per trained token")
    loss.set_ylim(bottom=0)
    loss.legend(loc="upper right")
    norm.plot(at, [step["grad_norm"] for step in steps], color="#31a354", linewidth=0.8)
    norm.set_ylabel("gradient norm", color="#31a354")
    rate = norm.twinx()
    rate.plot(at, [step["lr"] for step in steps], color="#756bb1", linewidth=1.2)
    rate.set_ylabel("learning rate", color="#756bb1")
    speed.plot(at, [s["tokens_per_second"] for s in steps], color="#636363", linewidth=0.8)
    speed.set_ylabel("tokens/s without padding")
    speed.set_ylim(bottom=0)
    speed.set_xlabel("iteration")
    for axis in (loss, norm, speed):
        axis.grid(alpha=0.3)
    figure.suptitle(title or Path(jsonl).parent.name)
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)
    pyplot.close(figure)
    return Path(png)


def smoothed(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average with bias correction, as TensorBoard draws it."""
    out, average = [], 0.0
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**count))
    return out
