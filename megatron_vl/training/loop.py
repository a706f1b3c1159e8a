"""Train: from a Plan to a finished run. All ranks of all machines run this function."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_vl.errors import InputError, as_called
from megatron_vl.launch.stop import StopRequest
from megatron_vl.platform import current_device, initialize
from megatron_vl.training.checkpoint.best import read_best
from megatron_vl.training.checkpoint.export import Exporter
from megatron_vl.training.checkpoint.files import folder
from megatron_vl.training.checkpoint.record import write_beginning, write_options
from megatron_vl.training.checkpoint.resume import (
    check_files,
    load_checkpoint,
    read_loader_state,
)
from megatron_vl.training.checkpoint.saver import Saved, Saver
from megatron_vl.training.checkpoint.start import find_checkpoint
from megatron_vl.training.checkpoint.state import save_checkpoint
from megatron_vl.training.epochs import short_of_schedule
from megatron_vl.training.evaluate import evaluate
from megatron_vl.training.machine import communication_buffers
from megatron_vl.training.microbatches import Microbatches, train_loader
from megatron_vl.training.plan import Plan
from megatron_vl.training.reporting.describe import describe
from megatron_vl.training.reporting.experts import ExpertLoads
from megatron_vl.training.reporting.first_steps import Compare
from megatron_vl.training.reporting.metrics import duration
from megatron_vl.training.reporting.show import Show
from megatron_vl.training.resilience.guard import StepGuard, blame, update
from megatron_vl.training.resilience.hang import HangWatch
from megatron_vl.training.resilience.left_out import LeftOut
from megatron_vl.training.resilience.stragglers import BackwardTimers
from megatron_vl.training.setup import (
    build_model,
    build_optimizer,
    schedule_change,
    whole_weights,
)
from megatron_vl.training.step import mean_loss
from megatron_vl.weights.mcore_io import CheckpointInfo


def train(
    plan: Plan, *, stop: StopRequest, give_up: Callable[[str], None],
    first_step: Callable[[], None] = lambda: None, compare: Compare | None = None,
) -> None:
    """Run `plan` on this rank, from its checkpoint to its last step or until it is asked to stop.

    Args:
        give_up: ends this process with a message, when the run no longer gets on.
        first_step: called after this start's first step.
        compare: says what was predicted of the first steps, and what would help.
    """
    config = plan.config
    platform = initialize(
        plan.layout, embedding_stage=plan.split.embedding_chunk[0], seed=config.model.seed,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
    )
    watch = HangWatch(config.hang_seconds, config.stacks_dir, give_up)
    trainer = Trainer(plan, platform, stop, watch, compare=compare)
    trainer.say(trainer.described)
    if buffers := communication_buffers(plan.layout, plan.split.embedding_chunk[0]):
        trainer.say(buffers)
    if config.checkpoint.save is None:
        trainer.say("warning: no --save is given, so nothing of this run will be kept")
    if config.data.eval_iters == 0 and config.data.eval_interval:
        trainer.say("eval-iters is 0, so nothing is validated; leave it out for the whole split")
    watch.beat("loading")
    trainer.restore()
    if trainer.rank == 0:
        write_options(plan, platform.name)
        if not trainer.own:
            write_beginning(plan)
    begun = trainer.done
    if trainer.best.compares and not trainer.stopping and trainer.validation_due and (
        not trainer.best.knows(trainer.done)
    ):
        trainer.evaluate(trainer.done)  # which the start before did not come to
    saves = config.checkpoint.save is not None
    while not trainer.ended and not trainer.stopping and not trainer.leaving:
        trainer.step(trainer.done + 1)
        trainer.poll_saves()
        if trainer.done == begun + 1:
            first_step()
        last = trainer.ended or trainer.stopping or trainer.leaving
        # Saved first: a validation that fails costs no training.
        if saves and (last or _due(trainer.done, config.checkpoint.save_interval)):
            trainer.save()
        if trainer.validation_due and not trainer.stopping:
            if trainer.ended:
                trainer.poll_saves(wait=True)
            trainer.evaluate(trainer.done)
        if trainer.leaving:
            break
    if saves and trainer.saved < trainer.done:  # asked to stop while it validated, or early
        trainer.save()
    trainer.close()


def _due(iteration: int, interval: int) -> bool:
    return interval > 0 and iteration % interval == 0


class Trainer:
    """The pieces of one run on one rank."""

    def __init__(
        self, plan: Plan, platform, stop: StopRequest, watch: HangWatch, *,
        compare: Compare | None = None,
    ):
        self.plan, self.config, self.platform = plan, plan.config, platform
        self.stop, self.watch = stop, watch
        self.stopping = False  # some rank was asked to stop, and all know
        self.leaving = ""  # the option that ends this start after its step
        self.rank = torch.distributed.get_rank()
        self.device = current_device()
        self.started = time.perf_counter()
        self.done = self.saved = 0  # steps, and steps of the last checkpoint
        self.show = Show(plan, platform, self.device, compare=compare)
        self.source, self.own = self._find_checkpoint()
        watch.beat("building the model")
        self.model = build_model(plan, platform, initialize_weights=self.source is None)
        self.model[0].config.timers = BackwardTimers(self.show.backward)
        self.optimizer, self.scheduler = build_optimizer(plan, self.model, platform)
        fault, exports = self.config.fault, self.config.checkpoint.exports
        self.guard = StepGuard(max_skipped=fault.max_skipped_steps, spike=fault.skip_grad_spikes)
        self.exporter = Exporter(self.say) if self.rank == 0 and exports else None
        self.saver = self._saver()
        self.microbatches = Microbatches(plan, self.model, watch, timed=self.show.clock.running)
        self.exchange = self.microbatches.exchange
        self.loads = ExpertLoads(plan, self.model, self.device)
        self.loader = self.streams = None
        self.left_out = LeftOut(self.config.data.max_skipped_samples)
        self.failed_save: Saved | None = None  # the last one, if it did
        self.described = describe(plan, platform)

    @property
    def ended(self) -> bool:
        return self.show.ended(self.done)

    @property
    def over(self) -> bool:
        """Whether nothing is left to train: the run ended, or early-stop ended it."""
        return self.ended or bool(self.best.early_end)

    @property
    def validation_due(self) -> bool:
        """Whether the step that was done last is to be validated."""
        data = self.config.data
        return data.validates and self.done > 0 and (
            self.ended or _due(self.done, data.eval_interval)
        )

    def say(self, text: str) -> None:
        self.show.say(text)

    # ---- start ------------------------------------------------------------------------------

    def _find_checkpoint(self) -> tuple[CheckpointInfo | None, bool]:
        """What to start from, with a look at every byte of this run's own checkpoints."""
        damaged: dict[Path, str] = {}
        while True:
            source, own = find_checkpoint(self.config, self.plan.spec, damaged)
            fault = ""
            if own and self.config.checkpoint.verify_checksums:
                self.watch.beat(f"checking {source.path}")
                fault = check_files(source.path)
            if not fault:
                break
            damaged[source.path] = fault
        for path, fault in damaged.items():
            self.say(f"DAMAGED: {path}: {fault}; going on from {source.path.name} instead")
        return source, own

    def _saver(self) -> Saver | None:
        options = self.config.checkpoint
        if options.save is None:
            return None
        return Saver(
            Path(options.save), behind=options.async_save, limit=options.save_total_limit,
            held=self._held,
        )

    def _held(self) -> set[str]:
        """Names of checkpoints that stay whatever the limit is: the best, and what is exported."""
        held = set(self.exporter.held) if self.exporter is not None else set()
        best = self.best.checkpoint
        return held if best is None else {*held, folder(self.saver.root, best).name}

    def restore(self) -> None:
        """Load what there is to load, and open the data where it was left."""
        loader_states: tuple = ()
        if self.source is not None:
            resumed = load_checkpoint(
                self.plan, self.source, self.own, self.model, self.optimizer, self.scheduler
            )
            self.done, loader_states = resumed.iteration, resumed.loader_states
            self.saved = self.done
            self.show.samples = resumed.samples
            self.guard.restore(resumed.guard)
            verb = "resumed from" if self.own else "loaded"
            self.say(f"{verb} {self.source.path}: {self.done} steps done"
                     + (f"; {resumed.weights}" if resumed.weights else ""))
            base = self.plan.trainable.adapter is not None and not self.config.lora.save_base
            if self.own and self.config.checkpoint.load is not None and not base:
                self.say(f"load {self.config.checkpoint.load} is not read: the run goes on from "
                         f"save")
            for name, count in (resumed.weights.not_finite if resumed.weights else {}).items():
                self.say(f"WARNING: {count:,} numbers of {name} are NaN or infinite")
            if resumed.schedule and (told := schedule_change(self.scheduler, resumed.schedule)):
                self.say(told)
        else:
            self.say("no checkpoint given: every weight starts random")
        self.best = read_best(self.config, self.done if self.own else 0)
        self._keep_best()
        self.watch.beat("opening the data")
        self.stopping = self._asked_to_stop()
        self.optimizer.zero_grad()
        batches = None
        if self.exchange.is_reader:
            self.loader = train_loader(self.plan)
            if loader_states:
                unknown = self.loader.restore_state(list(map(read_loader_state, loader_states)))
                if unknown:
                    self.say(f"NOT CHECKED: {unknown}")
            batches = iter(self.loader)
        (epoch,) = self._largest(self.loader.epoch or 0 if self.loader is not None else 0)
        self.show.epoch = int(epoch)
        if self.ended:
            option = self.config.length_option
            self.say(as_called(
                f"nothing to do: {self.done} steps are done, {option} is "
                f"{self.config.resolved()[option.replace('-', '_')]}; raise {option} to go on with "
                f"this run, or give --finetune and another --save to start a new one from its "
                f"weights"
            ))
        elif self.best.early_end:
            self.leaving = self.best.early_end
            self.say(as_called(
                f"nothing to do: {self.done} steps are done, and {self.leaving}; raise early-stop, "
                f"or leave it out, to go on with this run"
            ))
        self.streams = self.microbatches.streams(batches)
        self.show.start(self.done, self.described)

    # ---- one step ---------------------------------------------------------------------------

    def step(self, iteration: int) -> None:
        """Forward and backward over all microbatches, then one update."""
        self.watch.beat(f"training iteration {iteration}")
        self.show.before(iteration)
        started, self.exchange.wait_seconds = time.perf_counter(), 0.0
        losses = self.microbatches.backward(self.streams, self.optimizer)
        loss, trained = mean_loss(losses, self.device)
        updated, grad_norm, fault = update(self.optimizer, loss, self.guard)
        lr = self.scheduler.get_lr({})  # not of a group, which may be a part's own
        if updated:
            self.scheduler.step(increment=1)
        counts, *_ = [stream.take_counts() for stream in self.streams]  # chunks see the same rows
        left_out, stopping = self.show.step(
            iteration, counts, started=started, data_wait_seconds=self.exchange.wait_seconds,
            asked_to_stop=bool(self.stop.reason),
            load=self.loads.take(),
            loss=loss, lr=lr, grad_norm=float(grad_norm or 0.0), trained_tokens=trained,
            skipped=not updated, fault=fault,
        )
        self.left_out.total += left_out
        if self.exchange.is_reader:
            self.left_out.tell(counts.skipped)
        if too_many := self.left_out.too_many():
            self.poll_saves(wait=True)
            raise InputError(too_many)
        self.done, self.stopping = iteration, stopping
        self.leaving = self._leaves()
        if fault:
            if self.guard.exhausted:
                self.poll_saves(wait=True)
            self.say(self.guard.skip(iteration, fault, blame(losses, counts.sample_keys)))

    def _largest(self, *numbers: float) -> list[float]:
        """Of all ranks."""
        box = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
        return box.tolist()

    def _asked_to_stop(self) -> bool:
        """Whether any rank was; all ranks ask together."""
        return bool(self._largest(bool(self.stop.reason))[0])

    def _leaves(self) -> str:
        """Why this start ends before the run does; empty if it does not. All ranks ask together."""
        batch = self.config.batch
        minutes = batch.exit_duration_in_mins
        if batch.exit_interval is not None and _due(self.done, batch.exit_interval):
            return f"exit-interval is {batch.exit_interval}"
        # By one rank's clock.
        over = self.rank == 0 and time.perf_counter() - self.started > 60 * (minutes or math.inf)
        if minutes is not None and self._largest(over)[0]:
            return f"exit-duration-in-mins is {minutes:g}"
        return ""

    # ---- validation -------------------------------------------------------------------------

    def evaluate(self, iteration: int) -> None:
        """Validate and tell it, or give it up where a rank was asked to stop; what is better than
        any checkpoint is saved."""
        with torch.no_grad(), whole_weights(self.model):
            found = evaluate(
                self.microbatches, iteration, stopping=self._asked_to_stop, tell=self.left_out.tell
            )
        self.stopping = found is None
        if found is None:
            self.say(f"validation after iteration {iteration} was given up")
            return
        if found.trained == 0:
            self.poll_saves(wait=True)
            raise InputError(
                "the validation split has no trained token; give another valid-data-path, or "
                "eval-interval 0."
            )
        self.show.validation(iteration, found)
        figures = found.figures
        self.best.add(iteration, loss=figures.loss, exact=figures.exact_accuracy)
        if self.best.to_be_saved() and self.saved < iteration:
            self.poll_saves(wait=True)  # one save at a time; what was in work may be no worse
            if self.best.to_be_saved():
                self.save()
        self._keep_best()
        self.leaving = self.leaving or self.best.early_end

    def _keep_best(self) -> None:
        """Say which checkpoint is the best where it is read."""
        if self.rank == 0 and self.done:
            try:
                self.best.write()
            except OSError as error:
                self.say(f"WARNING: {self.best.file} was not written: {error}")

    # ---- end --------------------------------------------------------------------------------

    def save(self) -> None:
        """Save what is done, or begin to."""
        self.watch.beat(f"saving iteration {self.done}")
        state = self.loader.save_state_rank() if self.loader is not None else None
        with whole_weights(self.model):
            ended = save_checkpoint(
                self.saver, self.plan, self.done, self.model, self.optimizer, self.scheduler,
                loader_state=state, guard=self.guard.state(), samples=self.show.samples,
            )
        self._tell_saved(ended)
        self.saved = self.done

    def poll_saves(self, *, wait: bool = False) -> None:
        """Tell the saves that have ended; `wait` for what is behind training, as before an end."""
        if self.saver is not None:
            self._tell_saved(self.saver.poll(wait=wait))
        if self.exporter is not None:
            self.exporter.poll()

    def _tell_saved(self, ended: list[Saved]) -> None:
        for one in ended:
            if one.error:
                self.failed_save = one
                self.say(
                    f"NOT SAVED: iteration {one.iteration}: {one.error}; the checkpoints before it "
                    f"stay, training goes on"
                )
                continue
            self.failed_save = None
            self.best.whole.add(one.iteration)
            self._keep_best()
            self.say(f"saved {one.path} in {one.seconds:.1f} s")
            if one.deleted:
                self.say(f"deleted iterations {', '.join(map(str, one.deleted))}, as "
                         f"save-total-limit {self.saver.limit} says")
            if one.warning:
                self.say(f"WARNING: {one.warning}")
            every = self.config.checkpoint.export_hf_interval
            if self.exporter is not None and _due(one.iteration, every or 0):
                self.exporter.export(one.path)

    def _finish_exports(self) -> None:
        """Export the end of the run, unless this start ends before it, and wait for that."""
        if not self.config.checkpoint.exports:
            return
        last = folder(self.saver.root, self.done)
        early, busy = not self.over or self.stopping, True
        if self.exporter is not None and not early and last.is_dir():
            self.exporter.export(last)
        while busy and not early:
            self.watch.beat(f"exporting {last}")
            time.sleep(0.1)
            busy, early = self._largest(
                self.exporter is not None and self.exporter.poll(), bool(self.stop.reason)
            )
        if self.exporter is not None and early and last.is_dir():
            why = "the run was asked to stop" if self.over else "the run is not at its end"
            self.exporter.give_up(last, why)

    def close(self) -> None:
        self.poll_saves(wait=True)
        self._finish_exports()
        self.watch.close()
        (peak,) = self._largest(self.platform.peak_memory_bytes())
        done = "done"
        if self.stopping or (self.leaving and not self.ended):
            why = self.leaving or "asked to stop"
            goes_on = "" if self.best.early_end else ", the same command goes on"
            done = f"{as_called(why)}; {self.done} steps are done{goes_on}; ran"
        elif told := short_of_schedule(self.config, self.done):
            self.say(as_called(told))
        if told := self.best.told():
            self.say(told)
        self.say(f"{done} in {duration(time.perf_counter() - self.started)}; "
                 f"peak memory of a rank {peak / 2**30:.2f} GiB")
        if self.loader is not None:
            self.loader.close()
        self.show.close()
        if self.failed_save is not None:
            raise InputError(
                f"the last checkpoint, of iteration {self.failed_save.iteration}, could not be "
                f"saved ({self.failed_save.error}); mend that and start again, which goes on from "
                f"the one before."
            )
        if self.exporter is not None and self.exporter.failed:
            raise InputError(f"the run is done, but it could not be exported: "
                             f"{self.exporter.failed}.")
