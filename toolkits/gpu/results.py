"""What a step found: tables and facts in one JSON file, on disk after every row."""

from __future__ import annotations

import json
import os
from pathlib import Path


class Results:
    """The file of one step.

    Attributes:
        data: {"tables": {title: {"note": text, "rows": [{column: value}]}}, "facts": {..},
            "failed": [sentence]}.
    """

    def __init__(self, path: Path):
        self.path = path
        self.data: dict = {"tables": {}, "facts": {}, "failed": []}

    def row(self, table: str, /, note: str = "", **columns: object) -> None:
        """Add a row; a name with underscores becomes a column's title with spaces."""
        found = self.data["tables"].setdefault(table, {"note": note, "rows": []})
        found["rows"].append({name.replace("_", " "): one for name, one in columns.items()})
        self.save()

    def fact(self, **facts: object) -> None:
        self.data["facts"].update(facts)
        self.save()

    def failed(self, sentence: str) -> None:
        print(f"FAILED: {sentence}", flush=True)
        self.data["failed"].append(sentence)
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1))
        os.replace(new, self.path)


def first_line(error: BaseException | str) -> str:
    """The first line that says something, and the kind of error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return (kind + text)[:240]


def read_fact(folder: Path, step: str, name: str) -> float | None:
    """A fact of a step that ran before; None where it has not."""
    try:
        return json.loads((folder / f"{step}.json").read_text())["facts"].get(name)
    except (OSError, ValueError, KeyError):
        return None
