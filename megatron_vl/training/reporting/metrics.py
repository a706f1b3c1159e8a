"""The numbers of a run: one line an iteration, TensorBoard, trackers, and a JSONL of the same."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_vl.errors import printable
from megatron_vl.training.reporting.flops import utilization
from megatron_vl.training.reporting.metrics_file import MetricsFile
from megatron_vl.training.reporting.trackers import attempt
from megatron_vl.training.reporting.validation import Answer, Figures, Validation
from megatron_vl.training.resilience.stragglers import Straggler

_LONGEST = 1000  # characters of a question or an answer in the metrics file


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One optimizer step, over all ranks."""

    iteration: int
    epoch: float | None = None  # times that the data were read; None where that is not known
    loss: float  # mean over trained tokens
    lr: float
    grad_norm: float  # before clipping
    step_seconds: float
    data_wait_seconds: float  # for the loader, longest of any reading rank
    rows: int
    positions: int  # of rows: what the language model went through, with padding
    tokens: int  # of samples, without padding
    trained_tokens: int
    samples: int
    images: int  # and videos
    samples_cut: int = 0  # too long for a row, without their ends
    tokens_cut: int = 0  # these ends'
    vision_flops: float  # needed forward and backward: see `step_flops`
    llm_flops: float
    memory_bytes: float  # peak so far of the rank that held most
    vision_balance: float | None = None  # of the vision tower's ranks: mean FLOPs / the busiest's
    experts: dict[str, float] = field(default_factory=dict)  # see `ExpertLoad.figures`
    slowest: Straggler | None = None
    skipped: bool  # the weights were kept
    fault: str = ""  # why; empty for a gradient too large for fp16's loss scale
    skipped_samples: dict[str, int] = field(default_factory=dict)  # left out by the data, by reason

    @property
    def mean_sequence_length(self) -> float:
        """Tokens of a sample."""
        return self.tokens / self.samples if self.samples else 0.0

    def rates(self) -> dict[str, float]:
        """What the counts come to in a second."""
        return {
            f"{name}_per_second": value / self.step_seconds
            for name, value in (
                ("llm_tokens", self.positions), ("tokens", self.tokens),
                ("samples", self.samples), ("images", self.images),
                ("vision_flops", self.vision_flops), ("llm_flops", self.llm_flops),
            )
        }


class MetricLog:
    """Writes every step where the user asked for it; only rank 0 makes one.

    Nothing that cannot be written ends the run: it is said, and training goes on.

    Args:
        train_iters: the run's last step.
        done: steps that were done before this start.
        jsonl: file to append to, None for no file.
        tensorboard_dir: directory, None for none.
        log_interval: steps between printed lines, and between what trackers get.
        say: prints a line.
        trackers: get the same numbers.
        ranks: devices of the run.
        peak_flops: of one of them in a second, for MFU; None where it is not known.
    """

    def __init__(
        self, train_iters: int, *, done: int = 0, jsonl: str | Path | None,
        tensorboard_dir: str | None, log_interval: int = 1, say: Callable[[str], None] = print,
        trackers=None, ranks: int = 1, peak_flops: float | None = None,
    ):
        self.train_iters = train_iters
        self.log_interval = log_interval
        self.say, self.trackers = say, trackers
        self.ranks, self.peak_flops = ranks, peak_flops
        self._asked: set[str] = set()  # samples whose question and pictures the file has
        self.first: tuple[int, float] | None = None  # iteration of the first step, and its end
        self.file = None if jsonl is None else MetricsFile(Path(jsonl), say)
        self.board = None
        if tensorboard_dir is not None:
            self._board(lambda: self._open_board(tensorboard_dir, done))

    # ---- what is told -------------------------------------------------------------------------

    def start(self, facts: dict) -> None:
        """What runs where with which options, for the file alone."""
        self._write("run", facts)

    def step(self, step: StepMetrics, *, last: bool = False) -> None:
        """`last`: of a run that ends by what it read."""
        self.first = self.first or (step.iteration, time.perf_counter())
        shown = last or step.iteration % self.log_interval == 0 or (
            step.iteration == self.train_iters
        )
        if shown:
            self.say(self.line(step))
        values = asdict(step)
        values |= values.pop("experts") | step.rates()
        values |= {"mean_sequence_length": step.mean_sequence_length}
        vision, language = self._mfu(step)
        values |= {} if vision is None else {"vision_mfu": vision, "llm_mfu": language}
        self._record("train", step.iteration, values, track=shown)

    def line(self, step: StepMetrics) -> str:
        """One line for people, in which programs find what they know from others.

        `'loss': 1.2345` and its neighbours stand as transformers' Trainer prints them, iteration
        and elapsed time as Megatron-LM does, tokens per sample as MindSpeed-MM.
        """
        width, rates = len(str(self.train_iters)), step.rates()
        vision, language = self._mfu(step)
        parts = [
            f"iteration {step.iteration:>{width}}/{self.train_iters}",
            f"{{'loss': {step.loss:.4f}, 'grad_norm': {step.grad_norm:.3f}, "
            f"'learning_rate': {step.lr:.3e}{_epoch(step.epoch)}}}",
            f"{rates['llm_tokens_per_second']:,.0f} tokens/s, "
            f"{rates['tokens_per_second']:,.0f} without padding",
            *([f"{rates['images_per_second']:,.1f} images/s"] if step.images else []),
            f"tokens per sample: {step.mean_sequence_length:.1f}",
            *([] if vision is None else
              [f"MFU {vision + language:.1%} = vision {vision:.1%} + LLM {language:.1%}"]),
            f"data wait {step.data_wait_seconds / step.step_seconds:.1%}",
            *([] if step.vision_balance is None else
              [f"vision balance {step.vision_balance:.0%}"]),
            *_experts(step.experts),
            f"memory {step.memory_bytes / 2**30:.2f} GiB",
            f"elapsed time per iteration (ms): {1000 * step.step_seconds:.1f}",
            f"ETA {duration(self._seconds_left(step))}",
        ]
        if step.slowest:
            parts.append(str(step.slowest))
        if step.samples_cut:
            parts.append(cut_off(step.samples_cut, step.tokens_cut))
        if step.skipped_samples:
            parts.append(left_out(step.skipped_samples))
        if step.skipped:
            parts.append(f"SKIPPED: {step.fault or 'the gradient is too large for the loss scale'}")
        return " | ".join(parts)

    def evaluation(self, iteration: int, found: Validation, *, epoch: float | None = None) -> None:
        figures, cut = found.figures, found.cut
        parts = [
            f"validation at iteration {iteration}",
            f"{{'eval_loss': {figures.loss:.4f}, 'eval_token_accuracy': "
            f"{figures.token_accuracy:.4f}, 'eval_exact': {figures.exact_accuracy:.4f}"
            f"{_epoch(epoch)}}}",
            f"perplexity {math.exp(min(figures.loss, 50.0)):.3f}",
            f"{figures.samples:,} samples, {found.trained:,} trained tokens",
            f"{found.seconds:.1f} s",
            *([cut_off(*cut)] if any(cut) else []),
            *([left_out(found.skipped)] if found.skipped else []),
        ]
        self.say(" | ".join(parts))
        for name, one in found.datasets.items():
            self.say(
                f"  of {printable(name)}: loss {one.loss:.4f}, token accuracy "
                f"{one.token_accuracy:.1%}, exact answers {one.exact_accuracy:.1%} of "
                f"{one.samples:,} samples"
            )
        self._record("validation", iteration, {
            "iteration": iteration, "epoch": epoch, **_named(figures),
            "trained_tokens": found.trained,
            "datasets": {name: _named(one) for name, one in found.datasets.items()},
            "skipped_samples": found.skipped, "samples_cut": cut[0], "tokens_cut": cut[1],
            "answers": [self._answer(one) for one in found.answers],
        }, more={
            f"{number}/{name}": value for name, one in found.datasets.items()
            for number, value in _named(one).items()
        })

    def _answer(self, one: Answer) -> dict:
        """What is asked stands where a start shows a sample first, as its pictures are large."""
        preview, answer = one.preview, {"sample": one.preview.name, "answer": _short(one.answer),
                                        "exact": one.exact}
        if preview.name in self._asked:
            return answer
        self._asked.add(preview.name)
        pictures = [base64.b64encode(data).decode("ascii") for data in preview.pictures]
        return answer | {
            "question": _short(preview.question), "expected": _short(one.expected),
            "pictures": pictures, "other_media": preview.others,
        }

    def ranks_seen(self, iteration: int, ranks: dict[str, list]) -> None:
        """Every rank's own numbers, for the file alone: they are many."""
        self._write("ranks", {"iteration": iteration, **ranks})

    def compared(self, values: dict) -> None:
        """The first steps and what was predicted of them, for the file alone."""
        self._write("compared", values)

    def experts_seen(self, iteration: int, steps: int, tokens: list[list[int]]) -> None:
        """Every expert's tokens of the latest steps, for the file alone."""
        self._write("experts", {"iteration": iteration, "steps": steps, "tokens": tokens})

    def _seconds_left(self, step: StepMetrics) -> float:
        """At the pace of this start so far, with all that happens between its steps."""
        first, ended = self.first or (step.iteration, 0.0)
        seconds = step.step_seconds
        if step.iteration > first:
            seconds = (time.perf_counter() - ended) / (step.iteration - first)
        return seconds * max(0, self.train_iters - step.iteration)

    # ---- where it goes ------------------------------------------------------------------------

    def _mfu(self, step: StepMetrics) -> tuple[float | None, float | None]:
        """The part of the devices' peak that the vision part and the language model used."""
        of = dict(seconds=step.step_seconds, ranks=self.ranks, peak=self.peak_flops)
        return utilization(step.vision_flops, **of), utilization(step.llm_flops, **of)

    def _record(
        self, kind: str, iteration: int, values: dict, *, track: bool = True,
        more: dict[str, float] | None = None,
    ) -> None:
        """`more`: numbers that stand elsewhere in the file."""
        self._write(kind, values)
        numbers = {
            f"{kind}/{name}": value for name, value in (values | (more or {})).items()
            if name != "iteration" and isinstance(value, (int, float))
        }
        if self.board is not None:
            self._board(lambda: self._draw(numbers, iteration))
        if self.trackers is not None and track:
            self.trackers.log({name: float(v) for name, v in numbers.items()}, iteration)

    def _write(self, kind: str, values: dict) -> None:
        if self.file is not None:
            self.file.write(kind, values)

    def _open_board(self, directory: str, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What the steps to come have shown there before is hidden.
        self.board = SummaryWriter(directory, purge_step=done + 1)

    def _draw(self, numbers: dict, iteration: int) -> None:
        for name, value in numbers.items():
            self.board.add_scalar(name, value, iteration)

    def _board(self, call: Callable[[], None]) -> None:
        if not attempt("TensorBoard", call, self.say):
            self.board = None

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self._board(self.board.close)
        if self.trackers is not None:
            self.trackers.close()


def _named(of: Figures) -> dict[str, float]:
    """As the files name them."""
    return {
        "validation_loss": of.loss, "token_accuracy": of.token_accuracy,
        "exact_accuracy": of.exact_accuracy, "samples": of.samples,
    }


def _experts(figures: dict[str, float]) -> list[str]:
    """`busiest expert 2.31x the mean`, and how many tokens were dropped where that may be."""
    told = []
    if "expert_load_max" in figures:
        told = [f"busiest expert {figures['expert_load_max']:.2f}x the mean"]
    if "dropped_tokens" in figures:
        dropped, routed = figures["dropped_tokens"], figures["routed_tokens"]
        told.append(f"experts dropped {dropped:,} tokens ({dropped / routed:.1%})")
    return told


def _epoch(epoch: float | None) -> str:
    return "" if epoch is None else f", 'epoch': {epoch:.2f}"


def _short(text: str) -> str:
    more = len(text) - _LONGEST
    return text if more <= 0 else f"{text[:_LONGEST]} … and {more:,} characters"


def left_out(skipped_samples: dict[str, int]) -> str:
    """`3 samples left out (2 too long, 1 unusable media)`."""
    total = sum(skipped_samples.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped_samples.items())
    return f"{total} sample{'s' if total > 1 else ''} left out ({reasons})"


def cut_off(samples: int, tokens: int) -> str:
    """`1,200 tokens cut off 3 long samples`."""
    return f"{tokens:,} tokens cut off {samples:,} long sample{'s' if samples > 1 else ''}"


def duration(seconds: float) -> str:
    """95 -> 1:35, 7265 -> 2:01:05."""
    whole = int(seconds + 0.5)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
