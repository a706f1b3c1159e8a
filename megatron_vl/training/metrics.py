"""The numbers of a run: one line an iteration, TensorBoard, and a JSONL of the same."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One optimizer step, over all ranks."""

    iteration: int
    loss: float  # mean over trained tokens
    lr: float
    grad_norm: float  # before clipping
    step_seconds: float
    data_wait_seconds: float  # for the loader, longest of any reading rank
    rows: int
    tokens: int  # of samples, without padding
    trained_tokens: int
    samples: int
    images: int
    vision_balance: float | None = None  # of the vision tower's ranks: mean FLOPs / the busiest's
    skipped: bool  # the optimizer found inf or nan gradients and kept the weights
    skipped_samples: dict[str, int] = field(default_factory=dict)  # left out by the data, by reason

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds


class MetricLog:
    """Writes every step where the user asked for it; only rank 0 makes one.

    Args:
        train_iters: the run's last step.
        jsonl: file to append to, None for no file.
        tensorboard_dir: directory, None for none.
        log_interval: steps between printed lines.
    """

    def __init__(
        self, train_iters: int, *, jsonl: str | None, tensorboard_dir: str | None,
        log_interval: int = 1,
    ):
        self.train_iters = train_iters
        self.log_interval = log_interval
        self.recent: list[float] = []  # seconds of the latest steps, for the ETA
        self.file = None
        if jsonl is not None:
            Path(jsonl).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(jsonl, "a", encoding="utf-8", buffering=1)
        self.board = None
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(tensorboard_dir)

    def step(self, step: StepMetrics) -> None:
        self.recent = [*self.recent, step.step_seconds][-50:]
        if step.iteration % self.log_interval == 0 or step.iteration == self.train_iters:
            print(self.line(step), flush=True)
        self._record("train", step.iteration, {
            **asdict(step), "tokens_per_second": step.tokens_per_second
        })

    def line(self, step: StepMetrics) -> str:
        left = sum(self.recent) / len(self.recent) * (self.train_iters - step.iteration)
        width = len(str(self.train_iters))
        parts = [
            f"iteration {step.iteration:>{width}}/{self.train_iters}",
            f"loss {step.loss:.4f}",
            f"lr {step.lr:.3e}",
            f"grad norm {step.grad_norm:.3f}",
            f"{step.tokens_per_second:,.0f} tokens/s",
            f"{step.samples / step.step_seconds:,.1f} samples/s",
            f"data wait {100 * step.data_wait_seconds / step.step_seconds:.1f}%",
            *([] if step.vision_balance is None else
              [f"vision balance {100 * step.vision_balance:.0f}%"]),
            f"ETA {duration(left)}",
        ]
        if step.skipped_samples:
            parts.append(left_out(step.skipped_samples))
        return " | ".join(parts + (["SKIPPED: gradient is not finite"] if step.skipped else []))

    def evaluation(
        self, iteration: int, loss: float, trained_tokens: int, seconds: float,
        skipped_samples: dict[str, int] | None = None,
    ) -> None:
        perplexity = math.exp(min(loss, 50.0)) if trained_tokens else float("nan")
        print(
            f"validation at iteration {iteration} | loss {loss:.4f} | "
            f"perplexity {perplexity:.3f} | {trained_tokens:,} trained tokens | {seconds:.1f} s"
            + (f" | {left_out(skipped_samples)}" if skipped_samples else ""),
            flush=True,
        )
        self._record("validation", iteration, {
            "iteration": iteration, "validation_loss": loss, "trained_tokens": trained_tokens,
            "skipped_samples": skipped_samples or {},
        })

    def _record(self, kind: str, iteration: int, values: dict) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"kind": kind, "time": time.time(), **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if name != "iteration" and isinstance(value, (int, float)):
                    self.board.add_scalar(f"{kind}/{name}", value, iteration)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def left_out(skipped_samples: dict[str, int]) -> str:
    """`3 samples left out (2 too long, 1 unusable media)`."""
    total = sum(skipped_samples.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped_samples.items())
    return f"{total} sample{'s' if total > 1 else ''} left out ({reasons})"


def duration(seconds: float) -> str:
    """95 -> 1:35, 7265 -> 2:01:05."""
    whole = int(seconds + 0.5)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
