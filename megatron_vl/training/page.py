"""A run as one HTML page that needs nothing beside it: no script, no other file.

All of it comes from the metrics file, and from what lies in the run's checkpoint directory now.
"""

from __future__ import annotations

import base64
import html
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path

from megatron_vl.outputs import replacing_file
from megatron_vl.parallel import Layout, StageSplit
from megatron_vl.training.config import GROUPS
from megatron_vl.training.history import History, names_of, page_of, read_history, total
from megatron_vl.training.layout_picture import draw_layout, talks
from megatron_vl.training.report import plot_runs

_RANKS = 64  # ranks whose times are listed, the slowest first

# Paths and names are another's text: should any of it ever pass for markup, nothing is run.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC",
  "Microsoft YaHei", sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff; }}
h1 {{ font-size: 1.5em; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15em; margin: 2em 0 .4em; }}
table {{ border-collapse: collapse; font-size: .9em; }}
th, td {{ padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd;
  vertical-align: top; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }}
th {{ font-weight: 600; background: #f4f6f8; }}
tr.marked td {{ background: #e6f0fa; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f8; padding: .7em 1em;
  font-size: .85em; }}
img {{ width: 100%; border: 1px solid #ddd; }}
.wide {{ overflow-x: auto; }}
.small {{ color: #555; font-size: .9em; }}
</style>
</head>
<body>
"""


def write_page(metrics: str | Path, page: str | Path | None = None) -> Path:
    """Write the page about the run of a metrics file, by default beside it; returns where.

    Raises:
        InputError: see `read_history`, `plot_runs` and `replacing_file`.
    """
    run = read_history(metrics)
    path = page_of(run.file) if page is None else Path(page)
    with replacing_file(path) as pending:
        pending.write_text(page_text(run), encoding="utf-8")
    return path


def page_text(run: History) -> str:
    title = names_of([run.file])[0]
    parts = [_HEAD.format(title=_text(title)), f"<h1>{_text(title)}</h1>\n", *_summary(run)]
    if run.steps:
        parts += ["<h2>plots</h2>\n", _picture(run)]
    start = run.starts[-1] if run.starts else None
    if start is not None:
        parts += _layout(start)
    parts += _data(run)
    parts += _ranks(run)
    if start is not None:
        parts += _checkpoints(start) + _configuration(start)
    return "".join([*parts, "</body>\n</html>\n"])


def _summary(run: History) -> list[str]:
    if not run.steps:
        return ["<p>No step yet.</p>\n"]
    last = run.steps[-1]
    seconds = total(run.steps, "step_seconds")
    rows = [
        ("steps", f"{last['iteration']:,} in {_hours(seconds)}, without validation and "
         f"checkpoints"),
        ("loss", f"{run.steps[0]['loss']:.4f} at first, {last['loss']:.4f} at last"),
    ]
    if run.validations:
        finite = [one for one in run.validations if math.isfinite(one["validation_loss"])]
        best = min(finite or run.validations, key=lambda one: one["validation_loss"])
        rows.append(("validation", f"{run.validations[-1]['validation_loss']:.4f} at last, "
                     f"{best['validation_loss']:.4f} at best, iteration {best['iteration']:,}"))
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
    return [_table(None, rows)]


def _picture(run: History) -> str:
    with tempfile.TemporaryDirectory() as folder:
        png = plot_runs([run], names_of([run.file]), Path(folder) / "plots.png").read_bytes()
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="loss, gradient norm, learning rate, throughput" ' \
           f'src="data:image/png;base64,{data}">\n'


def _layout(start: dict) -> list[str]:
    layout, split = Layout(**start["layout"]), StageSplit.from_dict(start["split"])
    told = talks(
        layout, split, distributed_optimizer=start["options"]["use_distributed_optimizer"],
        tied=start["tied"],
    )
    return [
        f"<h2>layout: {_text(str(layout))}</h2>\n",
        '<p class=small>Numbers are ranks. In a box tensor-parallel ranks stand side by side, '
        "context-parallel ones below each other.</p>\n",
        f"<div class=wide>{draw_layout(layout, split)}</div>\n",
        _table(("who talks to whom", "what", "ranks"), told) if told else
        "<p>One rank: nobody talks.</p>\n",
    ]


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
    rows += [(f"left out: {reason}", f"{count:,}") for reason, count in left_out.items()]
    if not left_out:
        rows.append(("left out", "none"))
    return ["<h2>data that was trained on</h2>\n",
            _table(None, [(name.replace("_", " "), value) for name, value in rows])]


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
        said = (f"<p>Slowest at the end: ranks {_text(', '.join(map(str, found['ranks'])))} on "
                f"{_text(', '.join(found['hosts']))}, {found['ratio']:.1f} times the others of "
                f"their stage.</p>\n")
    return [
        f"<h2>ranks{more}</h2>\n", said,
        _table(("rank", "stage", "host", "forward of a step, ms", "peak memory, GiB"), rows),
    ]


def _checkpoints(start: dict) -> list[str]:
    save = start["options"]["save"]
    if save is None:
        return ["<h2>checkpoints</h2>\n<p>The run had no place to save them.</p>\n"]
    rows = []
    for path in sorted(Path(save).glob("iter_*")):
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        rows.append((path.name, f"{len(sizes):,} files", _bytes(sum(sizes))))
    return [f"<h2>checkpoints in {_text(str(save))}</h2>\n",
            _table(("checkpoint", "", "size"), rows) if rows else "<p>None is there now.</p>\n"]


def _configuration(start: dict) -> list[str]:
    defaults = {f.name: f.default for group in GROUPS.values() for f in fields(group)}
    rows, marked = [], set()
    for name, value in start["options"].items():
        default = defaults.get(name)
        usual = list(default) if isinstance(default, tuple) else default
        if value != usual:
            marked.add(len(rows))
        rows.append((name.replace("_", "-"), "" if value is None else str(value)))
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    return [
        "<h2>what ran</h2>\n", f"<pre>{_text(start['described'])}</pre>\n",
        f"<p class=small>{_text(versions)}</p>\n",
        "<h2>configuration</h2>\n<p class=small>Marked: not the default.</p>\n",
        _table(("option", "value"), rows, marked),
    ]


def _table(
    header: Sequence[str] | None, rows: Iterable[Sequence[str]], marked: Iterable[int] = ()
) -> str:
    def row(cells: Sequence[str], tag: str, css: str = "") -> str:
        inner = "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells)
        return f"<tr{css}>{inner}</tr>\n"

    marked = set(marked)
    body = "".join(row(cells, "td", " class=marked" if number in marked else "")
                   for number, cells in enumerate(rows))
    return f"<div class=wide><table>\n{row(header, 'th') if header else ''}{body}</table></div>\n"


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:,.0f} s"


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)
