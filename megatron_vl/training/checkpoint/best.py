"""The best validation so far: SAVE/best_checkpoint.json, and the checkpoint that it names.

The file holds every validation, so that a run that goes on from any checkpoint knows what the best
one before it was, and how many were not better. A checkpoint is named when it is whole: of a run
that is killed before that, and validated again, it is named then.
"""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.training.checkpoint.files import folder, write_whole
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.typed import Count, Shape, read_file
from megatron_vl.weights.found import iterations

BEST = "best_checkpoint.json"
_SIGN = {"eval_loss": -1, "eval_exact": 1}  # of a measure: the better, the higher


class Validated(Shape):
    """The figures of one validation; of a loss that is not finite none."""

    iteration: Count
    eval_loss: float | None
    eval_exact: float

    def worth(self, measure: str) -> float:
        """The higher, the better; nothing is worse than no figure."""
        value = getattr(self, measure)
        return -math.inf if value is None else _SIGN[measure] * value


class Record(Shape):
    """The file."""

    measure: str
    checkpoint: Count | None  # the iteration of the best one that is kept
    value: float | None  # its figure
    validations: list[Validated]


class Best:
    """What is known of a run's validations; alike on every rank, and written by rank 0.

    Args:
        validations: those of the steps that are done, in their order.
        whole: iterations whose checkpoints are in SAVE.
        named: the iteration that the file names.
    """

    def __init__(self, config: TrainConfig, validations: list[Validated], whole: set[int],
                 named: int | None):
        self.keeps = config.checkpoint.save_best is not None
        self.measure = config.checkpoint.save_best or "eval_loss"
        self.patience = config.batch.early_stop
        save = config.checkpoint.save
        self.file = None if save is None else Path(save) / BEST
        self.validations, self.whole = validations, whole
        self.named = named if named in whole else None

    @classmethod
    def read(cls, config: TrainConfig, done: int) -> Best:
        """Of the run in SAVE after `done` steps; what came after them does not count.

        Raises:
            InputError: the file is damaged.
        """
        if config.checkpoint.save is None or not done:
            return cls(config, [], set(), None)
        root = Path(config.checkpoint.save)
        whole = {one for one in iterations(root) if one <= done}
        if not (root / BEST).is_file():
            return cls(config, [], whole, None)
        found = read_file(root / BEST, Record, mend="remove it to forget the validations so far")
        validations = [one for one in found.validations if one.iteration <= done]
        return cls(config, validations, whole, found.checkpoint)

    @property
    def compares(self) -> bool:
        """Whether anything depends on validations."""
        return self.keeps or self.patience is not None

    @property
    def checkpoint(self) -> int | None:
        """The iteration of the checkpoint that stays; without save-best the one that an earlier
        start kept."""
        if not self.keeps:
            return self.named
        best = self._best(one for one in self.validations if one.iteration in self.whole)
        return None if best is None else best.iteration

    @property
    def stale(self) -> int:
        """Validations since the best one."""
        best = self._best(self.validations)
        seen = 0 if best is None else self.validations.index(best) + 1
        return len(self.validations) - seen

    @property
    def early_end(self) -> str:
        """Why the run is to end; empty if it is not."""
        if self.patience is None or self.stale < self.patience:
            return ""
        best = self._best(self.validations)
        since = "none is finite" if best is None else (
            f"none is better than {self._figure(best)}, of iteration {best.iteration}"
        )
        return f"early-stop is {self.patience}: of the {self.measure} of the last " \
               f"{self.stale} validations {since}"

    def knows(self, iteration: int) -> bool:
        return any(one.iteration == iteration for one in self.validations)

    def add(self, iteration: int, *, loss: float, exact: float) -> None:
        """The validation of a step."""
        self.validations.append(Validated(
            iteration=iteration, eval_loss=loss if math.isfinite(loss) else None, eval_exact=exact
        ))

    def to_be_saved(self) -> bool:
        """Whether the latest validation is better than that of any checkpoint there is."""
        if not self.keeps:
            return False
        there = [one for one in self.validations if one.iteration in self.whole]
        latest = self.validations[-1]
        return latest not in there and self._best([*there, latest]) == latest

    def write(self) -> None:
        """Raises OSError: it cannot be written."""
        if self.file is None or not self.compares:
            return
        at = self.checkpoint
        record = Record(
            measure=self.measure, checkpoint=at, validations=self.validations,
            value=next((getattr(one, self.measure) for one in self.validations
                        if one.iteration == at), None),
        )
        write_whole(self.file, json.dumps(record.model_dump(), indent=1) + "\n")

    def told(self) -> str:
        """Which checkpoint is the best, and how to convert it; empty without one."""
        at = self.checkpoint if self.keeps else None
        if at is None:
            return ""
        best = next(one for one in self.validations if one.iteration == at)
        path = folder(self.file.parent, at)
        command = shlex.join(["megatron-vl", "convert", str(path), "DIR", "--to", "hf",
                              "--hf-config", str(self.file.parent)])
        return (f"best checkpoint: {path}, {self.measure} {self._figure(best)}; as a Hugging Face "
                f"directory: {command}")

    def _best(self, of) -> Validated | None:
        """The first of the best ones; None of none, or where none has a figure."""
        best = max(of, key=lambda one: one.worth(self.measure), default=None)
        return None if best is None or getattr(best, self.measure) is None else best

    def _figure(self, one: Validated) -> str:
        return f"{getattr(one, self.measure):.4f}"


def read_best(config: TrainConfig, done: int) -> Best:
    """The same on every rank, of which one reads the file.

    Raises:
        InputError: see `Best.read`.
    """
    import torch

    box: list = [None]
    if torch.distributed.get_rank() == 0:
        try:
            box = [Best.read(config, done)]
        except InputError as error:
            box = [str(error)]
    torch.distributed.broadcast_object_list(box)
    if isinstance(box[0], str):
        raise InputError(box[0])
    return box[0]
