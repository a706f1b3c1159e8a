"""What is shown of a run: every rank counts and measures, rank 0 tells.

The loop says what happened; here it is summed over ranks and goes to the log line, the files, the
trackers, the profiler's traces and, at the end, the page about the run.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict

import torch
from megatron.core import parallel_state

from megatron_vl.data.conversation import REASONS
from megatron_vl.errors import InputError, as_called
from megatron_vl.models.common.media_share import loads
from megatron_vl.platform.peaks import peak_tflops
from megatron_vl.training.checkpoint.record import facts_of
from megatron_vl.training.plan import Plan
from megatron_vl.training.reporting.experts import ExpertLoad
from megatron_vl.training.reporting.first_steps import Compare, FirstSteps, Measured, told
from megatron_vl.training.reporting.flops import step_flops
from megatron_vl.training.reporting.metrics import MetricLog, StepMetrics
from megatron_vl.training.reporting.padding import PaddingWatch
from megatron_vl.training.reporting.page import write_page
from megatron_vl.training.reporting.profile import StepProfiler
from megatron_vl.training.reporting.progress import Console
from megatron_vl.training.reporting.throughput import Throughput
from megatron_vl.training.reporting.trackers import Trackers
from megatron_vl.training.reporting.validation import Validation
from megatron_vl.training.resilience.stragglers import PassClock, Stragglers, gather, host_names
from megatron_vl.training.step import StepCounts

RARELY = 100  # steps between the lines of the metrics file about single ranks and experts


class Show:
    """All ranks make one together; what only rank 0 does is left out on the others.

    Args:
        compare: says what was predicted of the first steps; None: nothing is told of them.
    """

    def __init__(
        self, plan: Plan, platform, device: torch.device, *, compare: Compare | None = None
    ):
        self.plan, self.platform, self.device = plan, platform, device
        self.compare = compare
        self.rank = torch.distributed.get_rank()
        self.console = Console()
        self.clock, self.backward = PassClock(platform), PassClock(platform)
        self.stragglers = Stragglers(plan.layout, host_names())
        # Ranks that each saw a part of the rows, which together are the step's.
        self.replicas = torch.distributed.get_process_group_ranks(
            parallel_state.get_data_parallel_group()
        )
        self.profiler = StepProfiler(plan.config.log, plan.profile_dir, self.rank)
        self.padding = PaddingWatch(plan.config.data.packing_buffer_size)
        self.log: MetricLog | None = None
        self.first_steps: FirstSteps | None = None
        self.throughput: Throughput | None = None
        self.iteration = self.first = 0
        self.memory: list[float] = []  # peak bytes of each rank
        self.loads: list[list[list[int]]] = []  # of each step that no line tells of yet
        self.samples: int | None = 0  # read so far over all ranks; None where that is not known
        self.epoch = 0  # samples of an epoch; 0 where there is none

    def say(self, text: str) -> None:
        if self.rank == 0:
            self.console.say(text)

    def start(self, done: int, described: str) -> None:
        """The run goes on from `done` steps, as `described`."""
        if self.rank != 0:
            return
        plan, options = self.plan, self.plan.config.log
        steps = plan.config.batch.train_iters
        name = self.platform.device_name()
        tflops = options.device_peak_tflops or peak_tflops(name)
        trackers = Trackers(options, plan.config.to_dict(), self.say)
        self.log = MetricLog(
            steps, done=done, jsonl=plan.metrics_file, tensorboard_dir=options.tensorboard_dir,
            log_interval=options.log_interval, say=self.say, trackers=trackers,
            ranks=plan.layout.world_size, peak_flops=None if tflops is None else tflops * 1e12,
        )
        self.log.start(facts_of(
            plan, device=name, platform=self.platform.name, peak_tflops=tflops,
            hosts=self.stragglers.hosts, described=described, done=done,
        ))
        if self.compare is not None:
            self.first_steps = FirstSteps(
                layout=plan.layout, device=name, counts_memory=not self.platform.in_host_memory)
        self.throughput = Throughput(max(0, steps - done), plan.layout.world_size)
        self.console.start(done, steps)

    # ---- a step -------------------------------------------------------------------------------

    def before(self, iteration: int) -> None:
        self.first = self.first or iteration
        self.profiler.before(iteration)

    def ended(self, done: int) -> bool:
        """Whether the run is at its end after `done` steps.

        What epochs come to in steps is a forecast where rows are packed; what was read is counted.
        """
        batch = self.plan.config.batch
        if batch.num_train_epochs is None or self.samples is None or not self.epoch:
            return done >= batch.train_iters
        return self.samples >= batch.num_train_epochs * self.epoch

    def step(
        self, iteration: int, counts: StepCounts, *, started: float, data_wait_seconds: float,
        asked_to_stop: bool, load: ExpertLoad | None = None, **numbers,
    ) -> tuple[int, bool]:
        """Tell a step, of which all that ranks need of each other is gathered at once.

        Args:
            started: when, on `time.perf_counter`.
            data_wait_seconds, asked_to_stop: of this rank.
            load: of the experts, where there are any.
            numbers: what `StepMetrics` needs and is the same on every rank.

        Returns:
            how many samples were left out for the first time, over all ranks, and whether one of
            the ranks was asked to stop.
        """
        mine = [asked_to_stop, data_wait_seconds, self.clock.take_seconds(),
                self.backward.take_seconds(), self.platform.peak_memory_bytes()]
        everyone = gather([*mine, *self._counted(counts)], self.device)
        asked, waits, forwards, backwards, memory = zip(
            *(one[: len(mine)] for one in everyone), strict=True
        )
        totals, new = self._totals([everyone[rank][len(mine):] for rank in self.replicas])
        self.iteration, self.memory = iteration, list(memory)
        seconds = time.perf_counter() - started
        if iteration > self.first:  # the first also warms up
            self.stragglers.add(list(forwards), seconds)
        if self.samples is not None:
            self.samples += totals["samples"] + sum(totals["skipped_samples"].values())
        last = self.ended(iteration)
        traced = self.profiler.after(iteration, last=last)
        if traced is not None:
            self.console.say(traced)
        if self.log is not None:
            metrics = StepMetrics(
                iteration=iteration, step_seconds=seconds, data_wait_seconds=max(waits),
                memory_bytes=max(memory), slowest=self.stragglers.slowest(), **totals, **numbers,
                epoch=self._epochs(), experts={} if load is None else load.figures(),
            )
            if load is not None:
                self.loads.append(load.tokens)
            self.log.step(metrics, last=last)
            self.throughput.add(metrics)
            if padded := self.padding.add(metrics.positions, metrics.tokens, last=last):
                self.say(as_called(padded))
            if self.first_steps is not None:
                self._compare(self.first_steps.add(
                    metrics, forward=forwards, backward=backwards, memory=memory, last=last))
            self.console.step(metrics.loss)
            if iteration % RARELY == 0:
                self._tell_ranks()
                self._tell_experts()
        return new, any(asked)

    def validation(self, iteration: int, found: Validation) -> None:
        if self.log is not None:
            self.log.evaluation(iteration, found, epoch=self._epochs())

    def _epochs(self) -> float | None:
        """Times that the data were read; None where that is not known."""
        return None if self.samples is None or not self.epoch else self.samples / self.epoch

    def _counted(self, counts: StepCounts) -> list[float]:
        """This rank's part of what `_totals` adds up."""
        spec, layout = self.plan.spec, self.plan.layout
        reasons = Counter(skipped.reason for skipped in counts.skipped)
        new = sum(skipped.first for skipped in counts.skipped)
        per_microbatch = [[spec.vision.forward_flops(grid) for grid in grids]
                          for grids in counts.grids]
        vision, language = step_flops(
            spec, grids=[grid for grids in counts.grids for grid in grids],
            lengths=counts.lengths, trained=counts.trained, trainable=self.plan.trainable,
        )
        return [
            counts.rows, counts.positions, counts.tokens, counts.samples, counts.images,
            counts.samples_cut, counts.tokens_cut, new,
            vision, language,
            sum(map(sum, per_microbatch)) / layout.media_ranks,
            sum(max(loads(one, layout.media_ranks)) for one in per_microbatch),
            *(reasons[reason] for reason in REASONS),
        ]

    def _totals(self, counted: list[list[float]]) -> tuple[dict, int]:
        """Over the ranks of `counted`, and how many samples were left out for the first time."""
        rows, positions, tokens, samples, images, samples_cut, tokens_cut, new, *rest = (
            int(sum(column)) for column in zip(*counted, strict=True)
        )
        vision, language, mean, busiest, *left_out = rest
        return dict(
            rows=rows, positions=positions, tokens=tokens, samples=samples, images=images,
            samples_cut=samples_cut, tokens_cut=tokens_cut,
            vision_flops=vision, llm_flops=language,
            vision_balance=mean / busiest if busiest and self.plan.layout.media_ranks > 1 else None,
            skipped_samples={r: n for r, n in zip(REASONS, left_out, strict=True) if n},
        ), new

    def _compare(self, measured: Measured | None) -> None:
        if measured is not None:
            compared = self.compare(self.plan, measured)
            self.say(told(measured, compared))
            self.log.compared(asdict(measured) | {"predicted": asdict(compared)})

    # ---- the end ------------------------------------------------------------------------------

    def _tell_ranks(self) -> None:
        if self.stragglers.latest:
            self.log.ranks_seen(self.iteration, {
                "forward_seconds": self.stragglers.typical(), "memory_bytes": self.memory,
                "hosts": self.stragglers.hosts,
            })

    def _tell_experts(self) -> None:
        """The tokens of every expert since the last line."""
        if self.loads:
            tokens = [[sum(steps) for steps in zip(*layer, strict=True)]
                      for layer in zip(*self.loads, strict=True)]
            self.log.experts_seen(self.iteration, len(self.loads), tokens)
            self.loads.clear()

    def close(self) -> None:
        """Finish every file; the page is made of them."""
        self.console.close()
        if self.log is None:
            return
        self._tell_ranks()
        self._tell_experts()
        if self.plan.config.log.log_tps:
            self.say("\n".join(self.throughput.lines()))
        self.log.close()
        if self.plan.report_file is not None:
            try:
                self.say(f"report: {write_page(self.plan.metrics_file, self.plan.report_file)}")
            except (OSError, InputError) as error:
                # What was trained is saved, and a page can be made again.
                self.say(f"warning: there is no report: {error}")
