"""Low-rank factors beside Megatron-Core's linear layers, in any layout.

Letters: s, b rows and columns of the layer's input, r rank, k published layers in one, t ranks of
tensor parallelism. What travels between ranks is narrow, k r columns instead of the layer's width:

    column-parallel: x [s, b, in] -> A x [s, b, k r]; its gradient is summed over t, since every
        rank has other rows of B. Under sequence parallelism s is a t-th, and A x is gathered.
    row-parallel: x [s, b, in/t] -> A x [s, b, r], summed over t; scattered under sequence
        parallelism.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import mappings
from torch.nn import functional as F

from megatron_vl.models.common.parts import part_of
from megatron_vl.parallel import LANGUAGE, Layout, StageSplit
from megatron_vl.peft.adapter_map import FACTORS, AdaptedWeight, AdapterMap, blocks
from megatron_vl.weights.map import Stored
from megatron_vl.weights.rules import box


class Lora(torch.nn.Module):
    """A and B of one linear layer.

    Args:
        a: [k r, in], for a row-parallel layer [r, in/t].
        b: [out/t, r], for a row-parallel layer [out, r].
        spread: [rows of b, k]; what a row of B takes of the layers' A x: their scales and zeros.
        cut: dimension of the layer's weight that tensor parallelism cuts.
    """

    def __init__(
        self, a: torch.Tensor, b: torch.Tensor, spread: torch.Tensor, *, cut: int, dropout: float,
        sequence_parallel: bool, group: torch.distributed.ProcessGroup,
    ):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)
        # In bf16 a scale would be off by up to 0.4 %.
        self.register_buffer("spread", spread.to(a.device, torch.float32), persistent=False)
        self.cut, self.dropout, self.group = cut, dropout, group
        self.sequence_parallel = sequence_parallel and group.size() > 1
        if group.size() > 1:
            of_ranks, alike = (self.b, self.a) if cut == 0 else (self.a, self.b)
            tensor_parallel.set_tensor_model_parallel_attributes(
                of_ranks, is_parallel=True, dim=cut, stride=1
            )
            # Alike on all ranks but seen by other tokens on each: Megatron-Core sums the gradient.
            alike.sequence_parallel = self.sequence_parallel

    def forward(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The layer's output for its input x, with what the factors add."""
        narrow = F.linear(self._dropped(x), self.a)
        if self.group.size() > 1:
            narrow = self._exchanged(narrow)
        # [rows, k, r]: a row's own block holds its B, the others zeros.
        wide = (self.b.unsqueeze(1) * self.spread.unsqueeze(2)).flatten(1)
        # One product that adds: the sum by itself would pass over two more tensors as wide.
        added = torch.addmm(output.flatten(0, -2), narrow.flatten(0, -2), wide.to(narrow.dtype).t())
        return added.view_as(output)

    def _exchanged(self, narrow: torch.Tensor) -> torch.Tensor:
        if self.cut == 0 and self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(narrow, group=self.group)
        if self.cut == 0:
            return mappings.copy_to_tensor_model_parallel_region(narrow, group=self.group)
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(narrow, group=self.group)
        return mappings.reduce_from_tensor_model_parallel_region(narrow, group=self.group)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.dropout):
            return x
        if self.group.size() > 1 and self.cut == 0 and not self.sequence_parallel:
            return F.dropout(x, self.dropout)  # the same on every rank
        # Ranks draw different numbers here, and how many: whole towers see images of their own.
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return F.dropout(x, self.dropout)


def attach(
    chunks: Sequence[torch.nn.Module], of: AdapterMap, layout: Layout, split: StageSplit, *,
    seed: int,
) -> None:
    """Puts factors beside every adapted layer of this rank's model; B is zero.

    A starts as PEFT's does, uniform up to 1/sqrt(in), from numbers that depend on `seed` and the
    layer's name alone: a run starts alike in every layout.
    """
    for one, _, _, module in adapted(chunks, of, split):
        group = module.tp_group
        tp, rank, here = group.size(), group.rank(), of.adapter.of(one.rule)
        a, b = (one.stored(factor, tp=tp, rank=rank, local=True) for factor in "AB")
        like = dict(dtype=module.weight.dtype, device=module.weight.device)
        scales = [*map(of.adapter.scale, here.values())]
        spread = torch.zeros(b.shape[0], one.blocks_of_a)
        if one.rule.axis == 1:
            spread[:, 0] = scales[0]
        else:
            for at, rows, number in blocks(one.rule, of.adapter, tp, rank):
                spread[at : at + rows, number % one.blocks_of_a] = scales[number]
        module.add_module("lora", Lora(
            _drawn(one, a, seed).to(**like), torch.zeros(b.shape, **like), spread,
            cut=one.rule.axis, dropout=of.adapter.dropout,
            sequence_parallel=layout.sequence_parallel and part_of(one.weight.name) == LANGUAGE,
            group=group,
        ))
        module.register_forward_hook(_add)


def factors(
    chunks: Sequence[torch.nn.Module], of: AdapterMap, split: StageSplit
) -> Iterator[tuple[Stored, torch.nn.Parameter]]:
    """(what it holds of the published factors, the parameter) of every factor of this rank."""
    for one, _, _, module in adapted(chunks, of, split):
        group = module.tp_group
        for factor, parameter in (("A", module.lora.a), ("B", module.lora.b)):
            yield one.stored(factor, tp=group.size(), rank=group.rank(), local=True), parameter


def is_second(name: str) -> bool:
    """Whether a parameter of this name is B of an adapted layer."""
    return name.endswith(f".{FACTORS['B']}")


def _add(module: torch.nn.Module, given: tuple, output: tuple) -> tuple:
    """The output of a linear layer and its bias, with what its factors add."""
    result, bias = output
    return module.lora(normed(module, given[0]), result), bias


def normed(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer multiplies: TransformerEngine's may begin with the norm before it."""
    weight = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return x
    if module.normalization == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, module.eps)
    return F.layer_norm(x, weight.shape, weight, module.layer_norm_bias, module.eps)


def adapted(
    chunks: Sequence[torch.nn.Module], of: AdapterMap, split: StageSplit
) -> Iterator[tuple[AdaptedWeight, int, str, torch.nn.Module]]:
    """(weight, number of its chunk, name in that, the linear layer) of this rank's model."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    for number, chunk in enumerate(chunks):
        for one in of.chunk(split, stage, number):
            name = one.module(local=True)
            yield one, number, name, chunk.get_submodule(name)


def _drawn(one: AdaptedWeight, a: Stored, seed: int) -> torch.Tensor:
    """Random numbers for a rank's part of A; zeros where it is filled up."""
    made, shapes = torch.zeros(a.shape), one.published()
    for piece in (piece for piece in a.pieces if piece.key is not None):
        whole = _uniform(shapes[piece.key], f"{seed} {piece.key}")
        made[box(piece.at, piece.shape)] = whole[box(piece.start, piece.shape)]
    return made


def _uniform(shape: tuple[int, int], seed: str) -> torch.Tensor:
    """What `kaiming_uniform_(a=sqrt(5))` gives a linear layer of [out, in]."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little")
    generator = torch.Generator().manual_seed(number)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
