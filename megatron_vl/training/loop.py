"""Train: from a Plan to a finished run. All ranks of all machines run this function."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice, tee

import torch
from megatron.core import parallel_state

from megatron_vl.data.loader import DataConfig, build_train_loader, build_valid_loader
from megatron_vl.data.samples import Skipped
from megatron_vl.errors import InputError
from megatron_vl.models.common.parts import PARTS, part_of
from megatron_vl.models.registry import family
from megatron_vl.ops.attention import choose_backend
from megatron_vl.platform import initialize
from megatron_vl.training.checkpoint import load_checkpoint, save_checkpoint
from megatron_vl.training.exchange import RowExchange
from megatron_vl.training.metrics import duration
from megatron_vl.training.plan import (
    Plan,
    find_checkpoint,
    media_limits,
    mixtures,
    trained_text,
)
from megatron_vl.training.record import write_options
from megatron_vl.training.setup import build_model, build_optimizer
from megatron_vl.training.show import Show
from megatron_vl.training.step import (
    RowStream,
    StepCounts,
    blank_like,
    forward_step,
    mean_loss,
    naming_rows,
    run_schedule,
)

TOLD = 10  # samples left out for one reason that a rank names; all are counted
NAMED = 64  # samples that a message names at most: a packed row's


def train(plan: Plan) -> None:
    """Run `plan` on this rank, from its checkpoint to its last step."""
    config = plan.config
    platform = initialize(
        plan.layout, embedding_stage=plan.split.last_vision_chunk[0], seed=config.model.seed,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
    )
    trainer = Trainer(plan, platform)
    trainer.say(trainer.described)
    trainer.restore()
    if trainer.rank == 0:
        write_options(plan, platform.name)
    for iteration in range(trainer.done + 1, config.batch.train_iters + 1):
        trainer.step(iteration)
        last = iteration == config.batch.train_iters
        # Saved first: a validation that fails costs no training.
        if config.checkpoint.save and (_due(iteration, config.checkpoint.save_interval) or last):
            trainer.save(iteration)
        if _due(iteration, config.data.eval_interval) or (last and config.data.eval_interval):
            trainer.evaluate(iteration)
    trainer.close()


def _due(iteration: int, interval: int) -> bool:
    return interval > 0 and iteration % interval == 0


class Trainer:
    """The pieces of one run on one rank."""

    def __init__(self, plan: Plan, platform):
        self.plan, self.config, self.platform = plan, plan.config, platform
        self.rank = torch.distributed.get_rank()
        self.device = torch.device(torch.cuda.current_device())
        self.started = time.perf_counter()
        self.done = 0
        self.source, self.own = find_checkpoint(plan)
        self.model = build_model(plan, platform, initialize_weights=self.source is None)
        self.optimizer, self.scheduler = build_optimizer(plan, self.model, platform)
        self.exchange = RowExchange(plan.layout, self.config.parallel.distributed_timeout_minutes)
        self.loader = self.streams = None
        self.left_out = 0  # samples that could not be used, over all ranks, each counted once
        self.told: Counter[str] = Counter()  # of them named by this rank, by reason
        self.described = describe(plan, platform)
        self.show = Show(plan, platform, self.device)

    def say(self, text: str) -> None:
        self.show.say(text)

    # ---- start ------------------------------------------------------------------------------

    def restore(self) -> None:
        """Load what there is to load, and open the data where it was left."""
        loader_states: tuple = ()
        if self.source is not None:
            resumed = load_checkpoint(
                self.plan, self.source, self.own, self.model, self.optimizer, self.scheduler
            )
            self.done, loader_states = resumed.iteration, resumed.loader_states
            verb = "resumed from" if self.own else "loaded"
            self.say(f"{verb} {self.source.path}: {self.done} steps done")
        else:
            self.say("no checkpoint given: every weight starts random")
        if self.done >= self.config.batch.train_iters:
            self.say(
                f"nothing to do: {self.done} steps are done, train-iters is "
                f"{self.config.batch.train_iters}"
            )
        self.optimizer.zero_grad()
        batches = None
        if self.exchange.is_reader:
            self.loader = build_train_loader(
                self._data_config(),
                data_parallel_group=parallel_state.get_data_parallel_group(),
                **self._reader(),
            )
            if loader_states:
                self.loader.restore_state(
                    [torch.load(path, weights_only=False) for path in loader_states]
                )
            batches = iter(self.loader)
        self.streams = self._streams(batches)
        self.show.start(self.done, self.described)

    def _streams(self, batches: Iterator | None) -> list[RowStream]:
        """One stream a model chunk; chunks of one rank see the same rows."""
        copies = tee(self.exchange.rows(batches), len(self.model))
        return [RowStream(copy, self.device) for copy in copies]

    def _data_config(self) -> DataConfig:
        data, batch = self.config.data, self.config.batch
        train, valid = mixtures(self.config)
        return DataConfig(
            train=train,
            valid=valid,
            seq_length=batch.seq_length,
            max_padding_length=batch.max_padding_length or batch.seq_length,
            micro_batch_size=batch.micro_batch_size,
            num_workers=data.num_workers,
            packing_buffer_size=data.packing_buffer_size or None,
            shuffle_buffer_size=data.shuffle_buffer_size,
            max_samples_per_sequence=data.max_samples_per_sequence,
            max_patches_per_row=data.max_patches_per_row,
            max_skipped_samples=data.max_skipped_samples,
            media=media_limits(self.config),
            trained=trained_text(self.config),
            seed=self.config.model.seed,
        )

    def _reader(self) -> dict:
        return dict(
            hf_dir=self.plan.hf_dir,
            spec=self.plan.spec,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
        )

    # ---- one step ---------------------------------------------------------------------------

    def _run(self, streams: list[RowStream], num_microbatches: int, forward_only: bool) -> list:
        with naming_rows(streams):
            outputs = run_schedule(
                self.model, streams, num_microbatches=num_microbatches,
                row_length=self.plan.row_length, forward_only=forward_only,
                micro_batch_size=self.config.batch.micro_batch_size,
                step=partial(
                    forward_step, per_sample=self.config.batch.calculate_per_sample_loss,
                    **({} if forward_only else {"timed": self.show.clock.running}),
                ),
            )
        self.exchange.settle()
        return outputs

    def step(self, iteration: int) -> None:
        """Forward and backward over all microbatches, then one update."""
        self.show.before(iteration)
        started, self.exchange.wait_seconds = time.perf_counter(), 0.0
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._run(self.streams, self.plan.num_microbatches, forward_only=False)
        updated, grad_norm, _ = self.optimizer.step()
        self.platform.synchronize()
        loss, trained = mean_loss(losses, self.device)
        lr = self.scheduler.get_lr({})  # not of a group, which may be a part's own
        if updated:
            self.scheduler.step(increment=1)
        counts, *_ = [stream.take_counts() for stream in self.streams]  # chunks see the same rows
        self.left_out += self.show.step(
            iteration, counts, started=started, data_wait_seconds=self.exchange.wait_seconds,
            loss=loss, lr=lr, grad_norm=float(grad_norm or 0.0), trained_tokens=trained,
            skipped=not updated,
        )
        if self.exchange.is_reader:
            self._tell(counts.skipped)
        self._check_left_out()
        finite = math.isfinite(loss) and math.isfinite(float(grad_norm or 0.0))
        if updated and not finite:
            what = "loss" if not math.isfinite(loss) else "gradient"
            blame = self._blame(losses, counts)
            raise InputError(
                f"the {what} of iteration {iteration} is not finite; {blame}; lower lr, or look at "
                f"them."
            )

    def _tell(self, skipped: list[Skipped]) -> None:
        """Name the first samples left out; every reader does for its own."""
        for one in skipped:
            if one.first and self.told[one.reason] < TOLD:
                print(f"skipped sample {one.sample}: {one.message}", flush=True)
                self.told[one.reason] += 1

    def _check_left_out(self) -> None:
        most = self.config.data.max_skipped_samples
        if self.left_out > most:
            raise InputError(
                f"{self.left_out} samples could not be used, more than max-skipped-samples {most}; "
                f"look at them with megatron-vl lint, or raise it."
            )

    def _blame(self, losses: list[dict], counts: StepCounts) -> str:
        """The samples of the rows whose loss is not finite, over all ranks; else of all rows."""
        mine = []
        for number, one in enumerate(losses):  # held by last stages alone
            if not torch.isfinite(one["sums"]).all():
                mine += counts.sample_keys[number]
        everyone: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        names = list(dict.fromkeys(name for one in everyone for name in one))
        if names:
            return f"the samples of its row are {', '.join(names[:NAMED])}"
        torch.distributed.all_gather_object(everyone, list(chain(*counts.sample_keys)))
        names = list(dict.fromkeys(name for one in everyone for name in one))
        return f"its samples were {', '.join(names[:NAMED])}"

    # ---- validation -------------------------------------------------------------------------

    def evaluate(self, iteration: int) -> None:
        """Mean loss over the validation split, or its first `eval_iters` batches."""
        started = time.perf_counter()
        for chunk in self.model:
            chunk.eval()
        reads, batches = self.exchange.is_reader, iter(())
        if reads:
            limit = self.config.data.eval_iters * self.plan.num_microbatches
            loader = build_valid_loader(
                self._data_config(), max_batches=limit or None, **self._reader()
            )
            batches = iter(loader)
        losses, skipped = [], Counter()
        while True:
            # The loader knows where the split ends; the replica's other ranks are told.
            group = list(islice(batches, self.plan.num_microbatches))
            if group and self.plan.layout.vp > 1:
                # The interleaved schedule takes whole rounds of the stages; padding trains nothing.
                group += [blank_like(group[0])] * (-len(group) % self.plan.layout.pp)
            size = self.exchange.number(len(group))
            if size == 0:
                break
            streams = self._streams(iter(group) if reads else None)
            with torch.no_grad():
                losses += self._run(streams, size, forward_only=True)
            if reads:
                left_out = streams[0].take_counts().skipped
                skipped.update(one.reason for one in left_out)
                self._tell(left_out)
        if reads:
            loader.close()
        loss, trained = mean_loss(losses, self.device)
        if trained == 0:
            raise InputError(
                "the validation split has no trained token; give another valid-data-path, or "
                "eval-interval 0."
            )
        if self.show.log is not None:
            # Rank 0 reads the integers of the whole split, but only its own rows' pixels.
            self.show.log.evaluation(
                iteration, loss, trained, time.perf_counter() - started, dict(skipped)
            )

    # ---- end --------------------------------------------------------------------------------

    def save(self, iteration: int) -> None:
        started = time.perf_counter()
        state = self.loader.save_state_rank() if self.loader is not None else None
        path = save_checkpoint(
            self.plan, iteration, self.model, self.optimizer, self.scheduler, state
        )
        self.say(f"saved {path} in {time.perf_counter() - started:.1f} s")

    def close(self) -> None:
        peak = torch.tensor([float(self.platform.peak_memory_bytes())], device=self.device)
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
        self.say(f"done in {duration(time.perf_counter() - self.started)}; "
                 f"peak memory of a rank {peak.item() / 2**30:.2f} GiB")
        if self.loader is not None:
            self.loader.close()
        self.show.close()


def describe(plan: Plan, platform) -> str:
    """What is about to run, in a few lines."""
    config, spec = plan.config, plan.spec
    rows = config.batch.global_batch_size
    return (
        f"{spec.model_type} on {platform.name}, {plan.layout}: {plan.split}\n"
        f"{rows} rows of {plan.row_length} tokens a step = {plan.num_microbatches} "
        f"microbatches x {config.batch.micro_batch_size} rows x {plan.layout.dp} data ranks; "
        f"{config.batch.train_iters} steps; {config.model.dtype}"
        f"{', deterministic' if torch.are_deterministic_algorithms_enabled() else ''}\n"
        f"{describe_parts(plan)}\n{describe_attention(plan)}"
        + ("" if platform.name != "cpu" or not config.optimizer.optimizer_cpu_offload else
           "\noptimizer-cpu-offload changes nothing here: the optimizer is in host memory anyway")
    )


def describe_parts(plan: Plan) -> str:
    """Parameters of every part of the whole model, and what becomes of them."""
    frozen, options = plan.config.model.frozen, plan.config.optimizer
    counts = Counter()
    for name, count in family(plan.spec.model_type).weight_map(plan.spec).counts().items():
        counts[part_of(name)] += count
    trained = sum(counts[part] for part in PARTS if part not in frozen)
    return f"{trained:,} of {counts.total():,} parameters are trained: " + ", ".join(
        f"{title} {counts[part]:,} "
        + ("frozen" if part in frozen else f"at lr {options.lr * options.lr_ratio(part):.3e}")
        for part, title in PARTS.items()
    )


def describe_attention(plan: Plan) -> str:
    """The attention backend of each tower on this rank, and why."""
    run = plan.config.model
    language, vision = (
        choose_backend(
            run.attention_backend, dtype=run.dtype, head_dim=tower.head_dim,
            deterministic=run.deterministic,
        )
        for tower in (plan.spec.decoder, plan.spec.vision)
    )
    if str(language) == str(vision):
        return f"attention: {language}"
    return f"attention: {language}\nattention of the vision tower: {vision}"
