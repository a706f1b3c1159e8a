"""A run as one HTML page that needs nothing beside it: no script, no other file.

All of it comes from the metrics file, and from what lies in the run's checkpoint directory now.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from dataclasses import fields
from datetime import datetime
from pathlib import Path

from megatron_vl.outputs import replacing_file
from megatron_vl.pages import escape, page, picture, table
from megatron_vl.parallel import Layout, StageSplit
from megatron_vl.training.checkpoint.export import HF, exported
from megatron_vl.training.dry_run import expert_rows, stage_rows
from megatron_vl.training.options.groups import GROUPS
from megatron_vl.training.reporting.answers import ANSWERS_STYLE, answers
from megatron_vl.training.reporting.experts_map import experts_part
from megatron_vl.training.reporting.history import History, names_of, page_of, read_history, total
from megatron_vl.training.reporting.report import ACCURACIES, plot_runs

_RANKS = 64  # ranks whose times are listed, the slowest first

_STYLE = """pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f8;
  padding: .7em 1em; font-size: .85em; }
img { width: 100%; border: 1px solid #ddd; }
.small { color: #555; font-size: .9em; }
"""


def write_page(metrics: str | Path, output: str | Path | None = None) -> Path:
    """Write the page about the run of a metrics file, by default beside it; returns where.

    Raises:
        InputError: see `read_history`, `plot_runs` and `replacing_file`.
    """
    run = read_history(metrics)
    path = page_of(run.file) if output is None else Path(output)
    with replacing_file(path) as pending:
        pending.write_text(page_text(run), encoding="utf-8")
    return path


def page_text(run: History) -> str:
    title = names_of([run.file])[0]
    parts = _summary(run)
    if run.steps:
        parts += ["<h2>plots</h2>\n", _plots(run)]
    parts += experts_part(run)
    start = run.starts[-1] if run.starts else None
    if start is not None:
        parts += _layout(start)
    parts += _compared(run)
    parts += answers(run.validations)
    parts += _data(run)
    parts += _ranks(run)
    if start is not None:
        parts += _checkpoints(start) + _configuration(start)
    return page(title, parts, style=_STYLE + ANSWERS_STYLE)


def _summary(run: History) -> list[str]:
    if not run.steps:
        return ["<p>No step yet.</p>\n"]
    last = run.steps[-1]
    seconds = total(run.steps, "step_seconds")
    rows = [
        ("steps", f"{last['iteration']:,}{_of_forecast(run)} in {_hours(seconds)}, without "
         f"validation and checkpoints"),
        *_epochs(run),
        ("loss", f"{run.steps[0]['loss']:.4f} at first, {last['loss']:.4f} at last"),
    ]
    if run.validations:
        finite = [one for one in run.validations if math.isfinite(one["validation_loss"])]
        best = min(finite or run.validations, key=lambda one: one["validation_loss"])
        rows.append(("validation loss", f"{run.validations[-1]['validation_loss']:.4f} at last, "
                     f"{best['validation_loss']:.4f} at best, iteration {best['iteration']:,}"))
        rows += _accuracies(run.validations)
    rows.append(("throughput", f"{total(run.steps, 'tokens') / seconds:,.0f} tokens/s without "
                 f"padding" if seconds else "not known"))
    if "llm_mfu" in last:
        vision, language = (
            sum(step.get(name, 0) * step["step_seconds"] for step in run.steps) / seconds
            for name in ("vision_mfu", "llm_mfu")
        )
        rows.append(("MFU", f"{vision + language:.1%}: vision {vision:.1%}, LLM {language:.1%}"))
    memory = max(step.get("memory_bytes", 0) for step in run.steps)
    if memory:
        rows.append(("memory", f"{memory / 2**30:.2f} GiB at most on one rank"))
    skipped = sum(bool(step.get("skipped")) for step in run.steps)
    if skipped:
        rows.append(("updates skipped", f"{skipped:,}; the log says why, and names their samples"))
    if run.starts:
        times = [f"{datetime.fromtimestamp(one['time']):%Y-%m-%d %H:%M:%S}, after iteration "
                 f"{one['done']:,}" for one in run.starts]
        rows.append(("started", "; ".join(times)))
        start = run.starts[-1]
        rows.append(("device", f"{len(start['hosts'])} x {start['device']} ({start['platform']}) "
                     f"on {', '.join(dict.fromkeys(start['hosts']))}"))
    return [table(rows)]


def _of_forecast(run: History) -> str:
    """Of a run of epochs with packed rows, whose steps nobody knows beforehand."""
    options = run.starts[-1]["options"] if run.starts else {}
    if options.get("num_train_epochs") is None or not options.get("packing_buffer_size"):
        return ""
    return f" of about {options['train_iters']:,} (forecast: rows are packed)"


def _epochs(run: History) -> list[tuple[str, str]]:
    done = run.steps[-1].get("epoch")
    if done is None:
        return []
    told = run.starts[-1]["options"].get("num_train_epochs") if run.starts else None
    return [("epochs", f"{done:.2f}" + ("" if told is None else f" of {told:g}"))]


def _accuracies(validations: list[dict]) -> list[tuple[str, str]]:
    """Of the validations that have any, which those of older runs have not."""
    rows = []
    for name, title in ACCURACIES.items():
        having = [one for one in validations if name in one]
        if having:
            best = max(having, key=lambda one: one[name])
            rows.append((title, f"{having[-1][name]:.1%} at last, {best[name]:.1%} at best, "
                         f"iteration {best['iteration']:,}"))
    return rows


def _plots(run: History) -> str:
    with tempfile.TemporaryDirectory() as folder:
        png = plot_runs([run], names_of([run.file]), Path(folder) / "plots.png").read_bytes()
    return picture(png, "loss, gradient norm, learning rate, throughput")


def _layout(start: dict) -> list[str]:
    layout = Layout(**start["layout"])
    header, *rows = stage_rows(layout, StageSplit.from_dict(start["split"]))
    parts = [f"<h2>layout: {escape(str(layout))}</h2>\n", table(rows, header=header)]
    if layout.ep > 1:
        header, *rows = expert_rows(layout, start["experts"])
        parts.append(table(rows, header=header))
    return parts


def _data(run: History) -> list[str]:
    if not run.steps:
        return []
    positions, tokens = total(run.steps, "positions"), total(run.steps, "tokens")
    left_out: Counter = Counter()
    for step in run.steps:
        left_out.update(step.get("skipped_samples") or {})
    rows = [(name, f"{total(run.steps, name):,.0f}") for name in (
        "samples", "images", "tokens", "trained_tokens", "rows")]
    if positions:
        rows.append(("padding", f"{1 - tokens / positions:.1%} of {positions:,.0f} positions"))
    if cut := total(run.steps, "samples_cut"):
        tokens_cut = total(run.steps, "tokens_cut")
        rows.append(("cut off", f"{tokens_cut:,.0f} tokens of {cut:,.0f} long samples"))
    rows += [(f"left out: {reason}", f"{count:,}") for reason, count in left_out.items()]
    if not left_out:
        rows.append(("left out", "none"))
    return ["<h2>data that was trained on</h2>\n",
            table([(name.replace("_", " "), value) for name, value in rows])]


def _compared(run: History) -> list[str]:
    """The first steps beside what was predicted of them."""
    if run.compared is None:
        return []
    found, predicted = run.compared, run.compared["predicted"]
    memory = found["memory_bytes"]
    busy = predicted["busy"]
    rows = [
        (str(stage), f"{expected / 2**30:.2f}", f"{memory[stage] / 2**30:.2f}" if memory else "-",
         f"{1000 * forward:.1f}", f"{1000 * backward:.1f}",
         f"{(forward + backward) / found['step_seconds']:.0%}",
         f"{1000 * busy[stage]:.1f}" if busy else "-")
        for stage, (expected, forward, backward) in enumerate(zip(
            predicted["memory_bytes"], found["forward"], found["backward"], strict=True))
    ]
    seconds = f"a step took {found['step_seconds']:.3g} s"
    if predicted["step_seconds"] is not None:
        seconds += f", {predicted['step_seconds']:.3g} s were predicted for {predicted['card']}"
    seconds += f"; waiting for data {found['data_wait_seconds'] / found['step_seconds']:.0%} of it"
    none = "" if memory else "; a CPU does not count what tensors take"
    return [
        f"<h2>prediction and fact, to iteration {found['iteration']}</h2>\n",
        f"<p>{escape(seconds + none)}.</p>\n",
        table(rows, header=("stage", "memory predicted, GiB", "measured, GiB", "forward, ms",
                            "backward, ms", "of a step", "both predicted, ms"),
              numeric=(True,) * 7),
        *([f"<p>{escape(predicted['advice'])}</p>\n"] if predicted["advice"] else []),
    ]


def _ranks(run: History) -> list[str]:
    if run.ranks is None:
        return []
    times, memory, hosts = (run.ranks[name] for name in
                            ("forward_seconds", "memory_bytes", "hosts"))
    layout = Layout(**run.ranks["layout"]) if run.ranks["layout"] else None
    order = sorted(range(len(times)), key=lambda rank: -times[rank])
    rows = [
        (str(rank), str(layout.coordinates(rank).pp) if layout else "", hosts[rank],
         f"{1000 * times[rank]:.1f}", f"{memory[rank] / 2**30:.2f}")
        for rank in order[:_RANKS]
    ]
    more = f", the slowest {_RANKS} of {len(times)}" if len(times) > _RANKS else ""
    found = run.steps[-1].get("slowest") if run.steps else None
    said = ""
    if found:
        said = (f"<p>Slowest at the end: ranks {escape(', '.join(map(str, found['ranks'])))} on "
                f"{escape(', '.join(found['hosts']))}, {found['ratio']:.1f} times the others of "
                f"their stage.</p>\n")
    return [
        f"<h2>ranks{more}</h2>\n", said,
        table(rows, header=("rank", "stage", "host", "forward of a step, ms", "peak memory, GiB"),
              numeric=(True, True, False, True, True)),
    ]


def _checkpoints(start: dict) -> list[str]:
    save = start["options"]["save"]
    if save is None:
        return ["<h2>checkpoints</h2>\n<p>The run had no place to save them.</p>\n"]
    rows = []
    made_of = exported(Path(save))
    for path in [*sorted(Path(save).glob("iter_*")), *([Path(save) / HF] if made_of else [])]:
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        of = f", {made_of.checkpoint} for transformers" if path.name == HF else ""
        rows.append((path.name, f"{len(sizes):,} files{of}", _bytes(sum(sizes))))
    return [
        f"<h2>checkpoints in {escape(save)}</h2>\n",
        table(rows, header=("checkpoint", "", "size")) if rows else "<p>None is there now.</p>\n",
    ]


def _configuration(start: dict) -> list[str]:
    defaults = {f.name: f.default for group in GROUPS.values() for f in fields(group)}
    changed, others = [], []
    for name, value in start["options"].items():
        default = defaults.get(name)
        usual = list(default) if isinstance(default, tuple) else default
        row = (name.replace("_", "-"), "" if value is None else str(value))
        same = value == usual or (usual is None and value is False)  # bf16 where a run has fp32
        (others if same else changed).append(row)
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    return [
        "<h2>what ran</h2>\n", f"<pre>{escape(start['described'])}</pre>\n",
        f"<p class=small>{escape(versions)}</p>\n",
        "<h2>configuration</h2>\n<p class=small>Marked: not the default.</p>\n",
        table(changed + others, header=("option", "value"), marked=range(len(changed))),
    ]


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:,.0f} s"
