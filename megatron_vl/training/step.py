"""One microbatch: get it, run the chunk, sum its loss. Knows rows, not families.

Letters: b rows, s row length, n trained positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_vl.data.encode.samples import IGNORE, RowBatch, Skipped
from megatron_vl.errors import InputError
from megatron_vl.ops.segments import Segments, segment_numbers
from megatron_vl.training.known_lengths import messages
from megatron_vl.training.scores import sum_scores


@dataclass
class StepCounts:
    """What went through one optimizer step on this rank."""

    rows: int = 0
    positions: int = 0  # of rows, with padding
    tokens: int = 0  # of samples, without padding
    trained: int = 0  # positions
    samples: int = 0
    images: int = 0
    sample_keys: list[list[str]] = field(default_factory=list)  # of each microbatch
    lengths: list[int] = field(default_factory=list)  # tokens of each sample
    grids: list[list[list[int]]] = field(default_factory=list)  # of each microbatch's media
    samples_cut: int = 0
    tokens_cut: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, batch: RowBatch) -> None:
        self.rows += batch.tokens.shape[0]
        self.positions += batch.tokens.numel()
        self.tokens += batch.num_tokens
        self.trained += int((batch.loss_mask > 0).sum())
        self.samples += batch.num_samples
        self.images += batch.num_images
        self.sample_keys.append(batch.sample_keys)
        self.lengths += batch.sample_lengths
        self.grids.append(batch.grid_thw.tolist())
        self.samples_cut += sum(map(bool, batch.tokens_cut))
        self.tokens_cut += sum(batch.tokens_cut)
        self.skipped += batch.skipped


class RowStream:
    """Microbatches for one model chunk, counted as they pass; what is computed with on its device.

    Args:
        pixels: whether the chunk computes with them; they are left out of others' microbatches.
    """

    def __init__(
        self, batches: Iterator[RowBatch], device: torch.device | str, *, pixels: bool = True
    ):
        self.batches = batches
        self.device = device
        self.pixels = pixels
        self.counts = StepCounts()
        self._ahead: RowBatch | None = None

    def ahead(self) -> RowBatch:
        """The next microbatch, which stays the next; on the host."""
        if self._ahead is None:
            self._ahead = next(self.batches)
        return self._ahead

    def __next__(self) -> RowBatch:
        batch, self._ahead = self.ahead(), None
        self.counts.add(batch)
        if not self.pixels:
            batch = replace(batch, pixel_patches=None)
        return batch.to(self.device, non_blocking=True)

    def __iter__(self):
        return self

    def take_counts(self) -> StepCounts:
        """The counts since the last call."""
        counts, self.counts = self.counts, StepCounts()
        return counts


@contextlib.contextmanager
def naming_rows(streams: list[RowStream]) -> Iterator[None]:
    """Out of memory, an error says which samples the rows held that were in work.

    Raises:
        InputError: the device's memory, or the machine's, did not suffice.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's has no type of its own
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        rows = [keys for stream in streams for keys in stream.counts.sample_keys[-1:]]
        names = ", ".join(dict.fromkeys(key for keys in rows for key in keys))
        raise InputError(
            f"the memory of this rank did not suffice ({str(error).splitlines()[0]}) at the row of "
            f"the samples {names}; lower image-max-pixels, max-patches-per-row or "
            f"micro-batch-size, or use recompute-granularity full."
        ) from error


def run_schedule(
    model: list, streams: list[RowStream], *, num_microbatches: int, row_length: int,
    micro_batch_size: int, forward_only: bool, step: Callable | None = None, **more,
) -> list:
    """`num_microbatches` of every chunk's stream through Megatron-Core's schedule for this layout.

    Args:
        model: this rank's chunks, wrapped for data parallelism.
        step: what is done with a microbatch; default: `forward_step`.
        more: the schedule's own further arguments.

    Returns:
        what the step's loss function gives for the log, a microbatch each; on last stages alone.
    """
    first, stream = model[0].module, streams[0]
    return get_forward_backward_func()(
        forward_step_func=step or forward_step,
        data_iterator=streams if len(streams) > 1 else streams[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=num_microbatches,
        seq_length=first.pipeline_length(row_length),
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        **messages(first.config, lambda: first.relay.shape(stream.ahead().tokens.shape)),
        **more,
    )


def run_batches(
    model: list, batches: list[RowBatch], device: torch.device | str, *,
    forward_only: bool = False, **more,
) -> list:
    """The same of a list of microbatches, all of one shape."""
    micro_batch_size, row_length = batches[0].tokens.shape
    return run_schedule(
        model, streams_of(model, [iter(batches) for _ in model], device),
        num_microbatches=len(batches), row_length=row_length, micro_batch_size=micro_batch_size,
        forward_only=forward_only, **more,
    )


def streams_of(
    model: list, batches: Sequence[Iterator[RowBatch]], device: torch.device | str
) -> list[RowStream]:
    """Every chunk's of its microbatches; pixels come to the first chunk of the first stage."""
    return [RowStream(each, device, pixels=chunk.module.pre_process)
            for chunk, each in zip(model, batches, strict=True)]


def blank_like(batch: RowBatch) -> RowBatch:
    """A microbatch of padding of the same shape: no image, nothing trained, nothing counted."""
    rows, length = batch.tokens.shape
    return RowBatch(
        tokens=torch.zeros_like(batch.tokens),
        labels=torch.full_like(batch.labels, IGNORE),
        loss_mask=torch.zeros_like(batch.loss_mask),
        position_ids=torch.arange(length).expand_as(batch.position_ids).contiguous(),
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * length,
        pixel_patches=None,
        grid_thw=batch.grid_thw[:0],
        sample_keys=[],
        sample_lengths=[],
        row_tokens=[0] * rows,
    )


def forward_step(
    stream: RowStream, model, *, per_sample: bool = False, timed=contextlib.nullcontext
):
    """Megatron-Core's forward step: the chunk's output, and the function that sums its loss.

    Of a chunk in evaluation it scores the samples too: see `sum_scores`. `per_sample` gives every
    sample the same weight, instead of every trained token; `timed` is entered around the chunk's
    own work.
    """
    batch = next(stream)
    loss_mask, samples = batch.loss_mask, None
    if per_sample:
        loss_mask, samples = equal_samples(batch.loss_mask, batch.cu_seqlens)
        if parallel_state.get_context_parallel_rank() > 0:
            samples.zero_()  # counted on the first of the ranks that share the row
    with timed():
        output = model(
            batch.tokens,
            batch.position_ids,
            Segments.from_cu_seqlens(batch.cu_seqlens, stream.device),
            pixel_patches=batch.pixel_patches,
            grid_thw=batch.grid_thw,
            labels=batch.labels,
            loss_mask=loss_mask,
            row_tokens=batch.row_tokens,
        )
    if model.training:
        return output, partial(sum_loss, samples=samples)
    return output, partial(
        sum_scores, batch=batch, share=model.module.share,
        sum_loss=partial(sum_loss, samples=samples),
    )


def equal_samples(
    loss_mask: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [b, s] that sum to 1 over each sample, and how many samples are trained (int []).

    Args:
        loss_mask: float [b, s], above 0 where a token is trained.
        cu_seqlens: int32 [segments + 1], cumulative lengths of the samples and the padding.
    """
    trained = (loss_mask.flatten() > 0).to(loss_mask.dtype)
    segment = segment_numbers(cu_seqlens)
    counts = trained.new_zeros(len(cu_seqlens) - 1).index_add(0, segment, trained)
    weights = trained / counts.clamp(min=1)[segment]
    return weights.view_as(loss_mask), (counts > 0).sum(dtype=torch.int)


def sum_loss(loss_n: torch.Tensor, *, samples: torch.Tensor | None = None):
    """Sum over the trained positions of a microbatch.

    Args:
        samples: int [], what the sum is to be divided by; None: the number of positions.

    Returns:
        the loss sum (a scalar with gradient), its divisor (int), and what the log needs.
        Megatron-Core divides the gradient once by the sum of the divisors over all microbatches and
        data-parallel ranks.
    """
    total = loss_n.sum()
    # Filled and not copied there, which would wait for the device.
    trained = torch.full((), loss_n.numel(), dtype=torch.int, device=loss_n.device)
    divisor = trained if samples is None else samples.to(loss_n.device, non_blocking=True)
    numbers = torch.stack([total.detach().double(), divisor.double(), trained.double()])
    return total, divisor, {"sums": numbers}


def mean_loss(per_microbatch: list[dict[str, torch.Tensor]], device: torch.device):
    """Mean loss, and the number of trained tokens, over microbatches and data-parallel ranks.

    Only last pipeline stages hold losses; every rank gets the result.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for one in per_microbatch:
        sums += one["sums"]
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        sums.zero_()
    torch.distributed.all_reduce(
        sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    torch.distributed.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    total, count, trained = sums.tolist()
    return (total / count if count else float("nan")), int(trained)
