"""gpu.md and gpu.html of what the steps have found so far."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_vl import pages

ENDINGS = {"MFU of measured": "%", "MFU of data sheet": "%", "share": "%", "data wait": "%",
           "forward of copy": "%", "both of copy": "%"}
FAILED, STEPS = "What failed", "Steps"


def gather(folder: Path, order: list[str]) -> tuple[dict, list[str], dict]:
    """(tables in order, sentences of failure, facts by step) of the results in `folder`."""
    tables: dict[str, dict] = {}
    failed, facts = [], {}
    for step in order:
        try:
            found = json.loads((folder / f"{step}.json").read_text())
        except (OSError, ValueError):
            continue
        failed += [f"{step}: {sentence}" for sentence in found["failed"]]
        facts[step] = found["facts"]
        for title, table in found["tables"].items():
            kept = tables.setdefault(title, {"note": table["note"], "rows": []})
            kept["note"] = kept["note"] or table["note"]
            kept["rows"] += table["rows"]
    return tables, failed, facts


def shown(column: str, value: object) -> str:
    """A cell's text: four significant digits, parts as percent."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if ENDINGS.get(column) == "%":
        return f"{100 * value:.1f} %"
    if isinstance(value, int):
        return f"{value:,}"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def columns_of(rows: list[dict]) -> list[str]:
    """Every row's columns in the order in which they come; an error last."""
    found = dict.fromkeys(name for row in rows for name in row if name != "error")
    return [*found, *(["error"] if any("error" in row for row in rows) else [])]


def render(out: Path, folder: Path, order: list[str], statuses: list[dict]) -> None:
    """Write both pages.

    Args:
        folder: holds a JSON file a step.
        statuses: a row a step, of how it ended.
    """
    tables, failed, facts = gather(folder, order)
    card = facts.get("card", {}).get("device", "unknown device")
    failed = [f"{one['step']}: {one['outcome']}" for one in statuses
              if one["outcome"] not in ("ok", "waiting", "running")
              and not one["outcome"].startswith("left out")] + failed
    tables = {STEPS: {"note": "", "rows": statuses},
              FAILED: {"note": "", "rows": [{"what": one} for one in failed]
                       or [{"what": "nothing"}]}, **tables}
    title = f"megatron_vl on {card}"
    text, parts = [f"# {title}\n"], []
    for name, table in tables.items():
        rows = table["rows"]
        header = columns_of(rows)
        cells = [[shown(column, row.get(column)) for column in header] for row in rows]
        numeric = [all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
                   for column in header]
        text.append(f"\n## {name}\n")
        if table["note"]:
            text.append(table["note"] + "\n")
        text += markdown(header, cells, numeric)
        note = f"<p>{pages.escape(table['note'])}</p>\n" if table["note"] else ""
        parts.append(f"<h2>{pages.escape(name)}</h2>\n{note}"
                     + pages.table(cells, header=header, numeric=numeric))
    (out / "gpu.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    (out / "gpu.html").write_text(pages.page(title, parts), encoding="utf-8")


def markdown(header: list[str], cells: list[list[str]], numeric: list[bool]) -> list[str]:
    def line(words: list[str]) -> str:
        return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"

    marks = ["---:" if number else "---" for number in numeric]
    return [line(header), line(marks), *map(line, cells)]
