"""Where rank 0 speaks: lines, and on a terminal a bar that stays below them."""

from __future__ import annotations

import sys


class Console:
    """Prints lines; a bar as well once it is told of steps, where stdout is a terminal."""

    def __init__(self) -> None:
        self._bar = None

    def say(self, text: str) -> None:
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self, done: int, steps: int) -> None:
        """Show how far the run is: `done` of `steps`."""
        if sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=done, desc="training", unit="step",
                             file=sys.stdout, dynamic_ncols=True)

    def step(self, loss: float) -> None:
        """One step more is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
