"""The numbers as tables, for the terminal and for the page."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from megatron_vl.errors import printable

_NUMBER = re.compile(r"[\d,.]+%?|-|")
_NAMED = 3  # samples named of each reason in a table


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of words under a heading; `marked` is the number of the row that was asked about."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int | None = None

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Of each column: whether numbers stand in it, which belong to the right."""
        return tuple(
            all(_NUMBER.fullmatch(cell) for cell in column)
            for column in zip(*self.rows, strict=True)
        )


def headline(numbers: dict) -> str:
    """The report in one sentence."""
    total = sum(dataset["samples"] for dataset in numbers["datasets"])
    seen, usable = numbers["looked_at"], numbers["usable"]
    refused = seen - usable
    words = f"{count(total)} samples in {numbers['split']}, "
    words += "all looked at, " if seen == total else f"{count(seen)} looked at, "
    return words + f"{count(usable)} usable, {count(refused)} refused"


def notes(numbers: dict) -> list[str]:
    """What to do with it, a sentence each."""
    if numbers["model"] is None:
        return ["without --model, tokens, patches and rows are not counted"]
    if "forecast" not in numbers:
        return ["no sample could be encoded, so no row can be foretold"]
    seen = "the samples" if numbers["looked_at"] >= sum(
        dataset["samples"] for dataset in numbers["datasets"]) else "the samples looked at"
    longest = numbers["a_sample"]["tokens"]["most"]
    found = [f"{numbers['trained_share']:.1%} of the tokens are trained"]
    found.append(
        f"the least --seq-length that loses none of {seen} is {count(numbers['least_seq_length'])};"
        f" the longest has {count(longest)} tokens"
    )
    if not numbers["decoded"] and sum(numbers["media"].values()):
        found.append("images and videos were not decoded; --decode does it")
    return found


def tables(numbers: dict) -> list[Table]:
    found = [_datasets(numbers["datasets"]), _kinds(numbers)]
    spreads = {name: value for name, value in numbers["a_sample"].items() if value}
    if numbers["media_width"]:
        spreads["media's width, pixels"] = numbers["media_width"]
        spreads["media's height, pixels"] = numbers["media_height"]
    found.append(Table(
        title="a sample", header=("", "least", "mean", "median", "p95", "most"),
        rows=tuple(
            (name, *(number(value[key]) for key in ("least", "mean", "median", "p95", "most")))
            for name, value in spreads.items()
        ),
    ))
    for limit in dict.fromkeys(one["max_patches"] for one in numbers.get("forecast", ())):
        found.append(_rows(numbers, limit))
    if numbers["refused"]:
        found.append(_refused(numbers["refused"]))
    found.append(_refused_by_prepare(numbers["datasets"]))
    return [table for table in found if table.rows]


def _datasets(datasets: list[dict]) -> Table:
    return Table(
        title="datasets",
        header=("", "samples (shards) by split", "read", "share", "looked at", "usable"),
        rows=tuple(
            (
                one["path"],
                ", ".join(f"{name} {count(of['samples'])} ({count(of['shards'])})"
                          for name, of in one["splits"].items()),
                count(one["samples"]), f"{one['share']:.1%}", count(one["looked_at"]),
                count(one["usable"]),
            )
            for one in datasets
        ),
    )


def _kinds(numbers: dict) -> Table:
    seen = max(1, numbers["looked_at"])
    rows = [(name, count(of), f"{of / seen:.1%}") for name, of in numbers["kinds"].items()]
    rows += [(f"{name} in all", count(of), "") for name, of in numbers["media"].items() if of]
    return Table(title="looked at", header=("", "samples", "share"), rows=tuple(rows))


def _rows(numbers: dict, limit: int | None) -> Table:
    """The forecast of rows without a limit of patches, or with one."""
    chosen = [one for one in numbers["forecast"] if one["max_patches"] == limit]
    within = "" if limit is None else f" of at most {count(limit)} patches"
    return Table(
        title=f"rows{within} (forecast)",
        header=("tokens a row", "samples lost", "rows an epoch", "samples a row", "filled",
                "padding", "filled unpacked", "patches a row", "most", "most/mean"),
        rows=tuple(
            (
                count(one["seq_length"]), f"{one['lost']:.1%}", number(one["rows"]),
                _decimal(one["samples"]), share(one["fill"]),
                share(None if one["fill"] is None else 1 - one["fill"]), share(one["alone"]),
                number(one["patches_mean"]), number(one["patches_max"]),
                _decimal(one["unevenness"], 2),
            )
            for one in chosen
        ),
        marked=[one["seq_length"] for one in chosen].index(numbers["seq_length"]),
    )


def _refused(refused: dict[str, dict]) -> Table:
    return Table(
        title="refused", header=("reason", "samples", "such as", "because"),
        rows=tuple(
            (
                reason, count(of["count"]),
                ", ".join(one["sample"] for one in of["samples"][:_NAMED]),
                of["samples"][0]["message"],
            )
            for reason, of in refused.items()
        ),
    )


def _refused_by_prepare(datasets: list[dict]) -> Table:
    return Table(
        title="refused when prepared, listed in refused.jsonl", header=("", "reason", "entries"),
        rows=tuple(
            (one["path"], reason, count(entries))
            for one in datasets for reason, entries in one["refused_by_prepare"].items()
        ),
    )


# ---- words -----------------------------------------------------------------------------------


def as_text(table: Table) -> str:
    """For a terminal: the first column to the left, numbers to the right."""
    cells = [[" ".join(printable(cell).split()) for cell in row] for row in
             (table.header, *table.rows)]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = [f"{table.title}:"]
    for place, row in enumerate(cells, start=-1):
        padded = [
            " " * (width - _width(cell)) + cell if right else
            cell + " " * (width - _width(cell))
            for cell, width, right in zip(row, widths, table.numeric, strict=True)
        ]
        mark = ">" if place == table.marked else " "
        lines.append(f"{mark} {'  '.join(padded)}".rstrip())
    return "\n".join(lines)


def _width(text: str) -> int:
    """Columns of a terminal that `text` takes: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def count(value: int) -> str:
    return f"{value:,}"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if value % 1 and value < 1000 else f"{value:,.0f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _decimal(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"

