"""Traces of chosen steps on chosen ranks, by torch's own profiler."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from megatron_vl.training.options.groups import LogOptions


class StepProfiler:
    """One trace of the steps from `profile_step_start` up to, not with, `profile_step_end`.

    A file a rank, in the form of Chrome's tracing, which TensorBoard's profiler and Perfetto open.
    """

    def __init__(self, log: LogOptions, directory: Path | None, rank: int):
        self.log, self.rank = log, rank
        self.directory = directory if log.profile and rank in log.profile_ranks else None
        self._running: torch.profiler.profile | None = None
        self._first = 0

    def before(self, iteration: int) -> None:
        """Start with the first step of the range that this run makes; a resumed one may miss it."""
        wanted = self.log.profile_step_start <= iteration < self.log.profile_step_end
        if self.directory is not None and self._running is None and wanted:
            self._running, self._first = torch.profiler.profile(), iteration
            self._running.start()

    def after(self, iteration: int, *, last: bool) -> str | None:
        """Write the trace if the range ends with this step or the run does; returns what to say."""
        if self._running is None or not (last or iteration + 1 == self.log.profile_step_end):
            return None
        running, self._running = self._running, None
        running.stop()
        path = self.directory / (
            f"rank{self.rank}.steps{self._first}-{iteration}.pt.trace.json.gz"
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # as on a full disk; the second is torch's own
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return f"warning: rank {self.rank} could not write {path}: {error}"
        return f"rank {self.rank} wrote {path}"
