"""The metrics file as it is written: a JSON object a line, whatever the disk does meanwhile."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from megatron_vl.training.reporting.history import cut_unfinished


class MetricsFile:
    """Appends lines to `path`; raises nothing when it cannot, as on a full disk.

    What could not be written is kept in memory and written as soon as it can be again. A line that
    was half written is finished then.

    Args:
        say: gets one sentence when lines begin to be kept, and one about those that are lost.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        self.path, self.say = path, say
        self._file: BinaryIO | None = None
        self._pending = bytearray()
        self._failing = False
        self._flush()

    def write(self, kind: str, values: dict) -> None:
        record = {"kind": kind, "time": time.time(), **values}
        self._pending += json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        self._flush()

    def close(self) -> None:
        self._flush()
        if lost := self._pending.count(b"\n"):
            self.say(f"warning: {self.path}: {lost} line{'s' * (lost > 1)} could not be written "
                     f"and {'are' if lost > 1 else 'is'} lost")
        self._pending.clear()
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:  # where a file system looks for room only now
                self._tell(error)
            self._file = None

    def _flush(self) -> None:
        """Write what is pending, as much as can be."""
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                cut_unfinished(self.path)
                self._file = open(self.path, "ab", buffering=0)
            while self._pending:
                del self._pending[: self._file.write(self._pending)]
        except OSError as error:
            if not self._failing:
                self._tell(error)
            self._failing = True
        else:
            self._failing = False

    def _tell(self, error: OSError) -> None:
        self.say(f"warning: {self.path} cannot be written ({error.strerror}); its lines are kept "
                 f"in memory until it can")


def _finite(value: Any) -> Any:
    """A value as strict JSON can say it: None for a number that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
