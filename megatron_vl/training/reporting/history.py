"""What a run wrote about itself, read back: its metrics file, a JSON object a line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.inputs import json_value

METRICS, PAGE = "metrics.jsonl", "report.html"
MAY_BE_NULL = ("loss", "grad_norm", "validation_loss")  # where they are not finite
_BEGIN = b'{"kind"'  # of every line, and so of the file
_LONGEST = 2**24  # bytes of a line: of tens of thousands of ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """A run with all its resumptions, each step once.

    Of a repeated one the later line counts; what came after the step that a run went back to is
    left out. Numbers that were not finite are NaN.
    """

    file: Path
    steps: list[dict]
    validations: list[dict]
    starts: list[dict]  # what ran where with which options, at every start; absent in old files
    experts: list[dict]  # tokens of every expert of every layer, each of some steps
    compared: dict | None  # the last start's first steps, with what was `predicted` of them
    ranks: dict | None  # the last word on each rank's times and memory, with `layout` as it was


def read_history(source: str | Path) -> History:
    """The run in a metrics file, or in a directory that holds one.

    Raises:
        InputError: no such file, or a line that is no JSON object of a known kind.
    """
    path = Path(source)
    path = path / METRICS if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a run's metrics.jsonl or its directory.")
    kinds: dict[str, dict[int, dict]] = {
        name: {} for name in ("train", "validation", "experts", "compared", "ranks")}
    starts: list[dict] = []
    try:
        with path.open("rb") as file:
            ours = _is_metrics(file.read(len(_BEGIN)))
            file.seek(0)
            for number, line in enumerate(file, 1):
                try:
                    _add(line, kinds, starts)
                except (ValueError, KeyError, TypeError):
                    if ours and not line.endswith(b"\n"):
                        break  # the last, of a run that is writing it or was killed
                    raise InputError(
                        f"{path}:{number} is not a line of run metrics; remove the line, or give a "
                        f"run's metrics.jsonl."
                    ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give another.") from error
    steps, validations, experts, compared, ranks = (
        [one[at] for at in sorted(one)] for one in kinds.values())
    return History(file=path, steps=steps, validations=validations, starts=starts, experts=experts,
                   compared=compared[-1] if compared else None, ranks=ranks[-1] if ranks else None)


def _add(line: bytes, kinds: dict[str, dict[int, dict]], starts: list[dict]) -> None:
    """Take in a line. Raises ValueError, KeyError or TypeError: it is none of a run's."""
    record = json_value(line)
    if record["kind"] == "run":
        starts.append(record)
        if "done" in record:  # what the run had done beyond it, it did not go on from
            for name, found in kinds.items():
                kinds[name] = {at: one for at, one in found.items() if at <= record["done"]}
        return
    found = kinds[record["kind"]]
    for name in MAY_BE_NULL:
        if name in record and record[name] is None:
            record[name] = math.nan
    if record["kind"] == "ranks":
        record["layout"] = starts[-1].get("layout") if starts else None
    found[int(record["iteration"])] = record


def _is_metrics(begin: bytes) -> bool:
    """Whether a file that begins so is a metrics file, or was to be one."""
    return begin.startswith(_BEGIN) or _BEGIN.startswith(begin)


def cut_unfinished(metrics: Path) -> None:
    """Take off a last line that a killed run did not finish, before another goes on behind it.

    One that only lacks its end of line gets it. Another's file is left as it is.
    """
    if not metrics.is_file():
        return
    with metrics.open("rb+") as file:
        if not _is_metrics(file.read(len(_BEGIN))):
            return
        start = max(0, file.seek(0, 2) - _LONGEST)
        file.seek(start)
        whole, newline, rest = file.read().rpartition(b"\n")
        try:
            json_value(rest)
            file.write(b"\n")
        except ValueError:
            file.truncate(start + len(whole) + len(newline))


def page_of(metrics: Path) -> Path:
    """Where the page about a run goes unless told: beside its metrics file, named after it."""
    return metrics.with_name(PAGE) if metrics.name == METRICS else metrics.with_suffix(".html")


def names_of(sources: Iterable[str | Path]) -> list[str]:
    """What tells runs apart: the directory's name, with as much before it as that takes.

    A directory `log` says nothing and is left out; a metrics file of another name has its own.
    """
    paths = [Path(source).absolute() for source in sources]
    folders = [path.parent if path.name == METRICS else path.with_suffix("")
               if path.suffix == ".jsonl" else path for path in paths]
    parts = [(one.parent if one.name in ("log", "logs") and one.parent.name else one).parts
             for one in folders]
    longest = max(map(len, parts), default=0)
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def total(steps: Sequence[dict], name: str) -> float:
    """The sum of a number over steps; older runs' lines may lack it."""
    return sum(step.get(name) or 0 for step in steps)
