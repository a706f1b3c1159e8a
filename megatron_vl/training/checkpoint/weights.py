"""A checkpoint's weights, put into the parameters of the model that runs.

The resharder's plan with this rank's parameters as its target: whatever the checkpoint was written
as, a Hugging Face directory or any layout of Megatron-Core's, each rank reads its own slices of it
and nothing else. Memory is a few megabytes beside the parameters; where these are quantised, one of
them is whole as well.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_vl.errors import InputError
from megatron_vl.models.common.layer_spec import to_local_names
from megatron_vl.models.registry import family
from megatron_vl.models.spec import ModelSpec
from megatron_vl.ops.quantized import QuantizedTensor
from megatron_vl.parallel import Layout, Shard, StageSplit
from megatron_vl.weights.convert import Ids, Source, open_weights
from megatron_vl.weights.dtypes import WEIGHTS, not_finite
from megatron_vl.weights.files import TensorAt
from megatron_vl.weights.map import Stored, WeightMap, listed, volume
from megatron_vl.weights.mcore_io import CheckpointInfo
from megatron_vl.weights.plan import CopyPlan, Op, TensorPlan, Twin, make_plan
from megatron_vl.weights.reshard import SPAN, Reader, chunks, twin_differs
from megatron_vl.weights.row_norms import told_normalized


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What was read."""

    nbytes: int  # by the rank that read most
    seconds: float
    not_finite: Mapping[str, int]  # NaN and Inf, by the names of the checkpoint's tensors
    note: str = ""  # what else to say of them

    def __str__(self) -> str:
        note = f"; {self.note}" if self.note else ""
        return f"{self.nbytes / 2**30:.2f} GiB a rank in {self.seconds:.1f} s{note}"


def load_weights(
    info: CheckpointInfo, model: list, spec: ModelSpec, layout: Layout, split: StageSplit
) -> Loaded:
    """Fill this rank's `model` from the weights of `info`. All ranks call it.

    Args:
        model: the rank's chunks, wrapped for data parallelism.
        split: of `model`; the checkpoint's may be another.

    Raises:
        InputError: a weight that the checkpoint or the model lacks, or of another shape; or two
            copies of one weight in the checkpoint that differ.
    """
    weights = family(spec.model_type).weight_map(spec)
    source = open_weights(info, weights)
    loaded = fill(list(_parameters(model, weights, layout, split)), source, info.path)
    return replace(loaded, note=told_normalized(source, weights))


def fill(
    parameters: Sequence[tuple[Stored, torch.Tensor]], source: Source, path: Path
) -> Loaded:
    """Fill this rank's tensors from its slices of `source`. All ranks call it.

    Args:
        parameters: what each holds of the published tensors, and the tensor itself.
        path: of the source, for messages.

    Raises:
        InputError: see `load_weights`.
    """
    started = time.perf_counter()
    plan = make_plan(source.inventory, [stored for stored, _ in parameters], everything=False)
    bad: dict[tuple[Op, ...], int] = {}
    with contextlib.ExitStack() as stack:
        mine = _share_of_twins(plan)
        reader = Reader(_needed(plan, mine, source), stack)
        for twin in mine:
            if reader.differ(twin):
                raise InputError(f"{path}: {twin_differs(twin)}; use another checkpoint.")
        for (_, parameter), tensor in zip(parameters, plan.tensors, strict=True):
            if count := _fill(parameter, tensor, reader):
                bad[tensor.ops] = count
    nbytes = sum(volume(op.shape) * source.dtypes[op.source.id].itemsize
                 for tensor in plan.tensors for op in tensor.ops)
    return _of_all_ranks(nbytes, bad, started)


def vision_inventory(
    weights: WeightMap, *, split: StageSplit, layout: Layout, shard: Shard, stage: int, chunk: int
) -> list[Stored]:
    """The vision weights of one chunk of a rank with this shard."""
    at = {"split": split, "stage": stage, "chunk": chunk}
    return [one for one in weights.chunk_inventory(**at, layout=layout, shard=shard)
            if _is_vision(one)]


def _is_vision(one: Stored) -> bool:
    return one.name.startswith("vision_model.")


def _parameters(
    model: list, weights: WeightMap, layout: Layout, split: StageSplit
) -> Iterator[tuple[Stored, torch.Tensor]]:
    """Every parameter of this rank, and what of the published tensors it holds."""
    shard = layout.shard(torch.distributed.get_rank())
    stage = parallel_state.get_pipeline_model_parallel_rank()
    for number, chunk in enumerate(model):
        at = {"split": split, "stage": stage, "chunk": number}
        wanted = weights.chunk_inventory(**at, layout=layout, shard=shard)
        if layout.vit_data_parallel:
            wanted = [one for one in wanted if not _is_vision(one)]
            wanted += vision_inventory(weights, **at, layout=Layout(), shard=Shard())
        own = {name: one for name, one in chunk.module.named_parameters() if ".lora." not in name}
        rules = {to_local_names(one.name, own): one for one in wanted}
        assert rules.keys() == own.keys(), f"weight map and model: {rules.keys() ^ own.keys()}"
        for name, stored in rules.items():
            assert stored.shape == own[name].shape, f"{name}: {stored.shape}, {own[name].shape}"
            yield stored, own[name]


def _share_of_twins(plan: CopyPlan) -> list[Twin]:
    """Those that this rank compares: a part for each, since each opens the whole checkpoint."""
    return list(plan.twins[torch.distributed.get_rank() :: torch.distributed.get_world_size()])


def _needed(plan: CopyPlan, twins: list[Twin], source: Source) -> dict[Ids, TensorAt]:
    """The tensors that this rank reads something of; the files of others are not opened."""
    names = {op.source.id for tensor in plan.tensors for op in tensor.ops}
    names |= {one.id for twin in twins for one in (twin.first, twin.second)}
    return {name: source.tensors[name] for name in names}


def _fill(parameter: torch.Tensor, plan: TensorPlan, reader: Reader) -> int:
    """Copy the slices of one tensor, cast to its dtype; answers how many are NaN or Inf.

    A quantised one is whole meanwhile, and the only one that is.
    """
    if isinstance(parameter, QuantizedTensor):
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        found = _fill(whole, plan, reader)
        parameter.store_(whole)
        return found
    dtype = WEIGHTS[str(parameter.dtype).removeprefix("torch.")]
    rows, found = parameter.shape[0], 0
    row_bytes = max(reader.row_bytes(plan), parameter[:1].numel() * dtype.itemsize)
    for start, stop in chunks(0, rows, row_bytes, SPAN):
        for chunk in reader.chunks(plan, (start, stop, plan.ops), dtype, row_bytes):
            found += sum(not_finite(bits, dtype) for _, bits in chunk.pieces)
            # A copy, since torch takes no array that must not be written to.
            bits = torch.from_numpy(chunk.assembled().view(f"i{dtype.itemsize}").copy())
            with torch.no_grad():
                parameter[chunk.first : chunk.first + len(bits)].copy_(bits.view(parameter.dtype))
    return found


def _of_all_ranks(nbytes: int, bad: Mapping[tuple[Op, ...], int], started: float) -> Loaded:
    """The most bytes and the longest time of a rank; each slice's NaN and Inf once."""
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(
        everyone, (nbytes, time.perf_counter() - started, dict(bad))
    )
    sizes, seconds, found = zip(*everyone, strict=True)
    once = {ops: count for one in found for ops, count in one.items()}
    return Loaded(
        nbytes=max(sizes), seconds=max(seconds),
        not_finite={listed(sorted({op.source.name for op in ops})): count
                    for ops, count in once.items()},
    )
