"""What one step of training leaves on a rank: losses of samples, outputs of modules, gradients."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import param_is_not_shared
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.identity_op import IdentityOp

from megatron_vl.ops.segments import segment_numbers

_LAYER = re.compile(r"(.*?\.layers\.\d+)(?:\.(.*))?")


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class NotFinite:
    """An output that holds NaN or Inf; ordered as they are computed."""

    microbatch: int
    chunk: int  # of the whole pipeline, in the order of its layers
    number: int  # among the outputs of that chunk
    module: str
    count: int  # of its numbers that are not finite
    size: int  # of all


@dataclass(kw_only=True, slots=True)
class Found:
    """Of the microbatches of this rank that are watched."""

    # Of each sample its mean loss, or this rank's part of that; by the microbatch's number from 0,
    # on last stages.
    losses: dict[int, list[float]] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)  # finite output, of each module
    not_finite: list[NotFinite] = field(default_factory=list)  # the first of each chunk and row


class Probe:
    """Watches the chunks of this rank while a step is computed.

    Args:
        model: chunks wrapped for data parallelism.
        wanted: whether a microbatch is watched, by its number from 0.
    """

    def __init__(self, model: list, wanted: Callable[[int], bool]):
        self.chunks, self.wanted = [chunk.module for chunk in model], wanted
        self.found = Found()
        self._begun = [0] * len(model)  # microbatches of each chunk
        self._watched: int | None = None  # the one in a forward pass; backward may repeat parts
        self._outputs = 0  # so far, of this pass

    @contextmanager
    def watching(self) -> Iterator[Found]:
        """Fills what it gives with what is computed meanwhile."""
        handles = []
        for number, chunk in enumerate(self.chunks):
            handles.append(chunk.register_forward_pre_hook(self._begins(number)))
            handles += [module.register_forward_hook(self._looks(number, name))
                        for name, module in _named(chunk, chunk.named_modules())
                        if name and not isinstance(module, IdentityOp)]
            handles.append(chunk.register_forward_hook(self._ends, with_kwargs=True))
        try:
            yield self.found
        finally:
            for handle in handles:
                handle.remove()

    def _begins(self, chunk: int) -> Callable:
        def begin(*_) -> None:
            microbatch, self._outputs = self._begun[chunk], 0
            self._begun[chunk] += 1
            self._watched = microbatch if self.wanted(microbatch) else None

        return begin

    def _looks(self, chunk: int, name: str) -> Callable:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        place = chunk * stages + parallel_state.get_pipeline_model_parallel_rank()

        def look(_module, _inputs, output) -> None:
            if self._watched is None:
                return
            self._outputs += 1
            for x in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
                    self._note(x.detach(), place, name)

        return look

    def _note(self, x: torch.Tensor, place: int, name: str) -> None:
        found, finite = self.found, x.isfinite()
        largest = float(x.abs().where(finite, 0).max())
        found.largest[name] = max(found.largest.get(name, 0.0), largest)
        last = found.not_finite[-1] if found.not_finite else None
        told = last is not None and (last.microbatch, last.chunk) == (self._watched, place)
        if not told and (count := x.numel() - int(finite.sum())):
            found.not_finite.append(NotFinite(
                microbatch=self._watched, chunk=place, number=self._outputs, module=name,
                count=count, size=x.numel(),
            ))

    def _ends(self, chunk, inputs, options, output) -> None:
        """Of a last stage, `output` is the losses of this rank's trained tokens."""
        if self._watched is not None and chunk.post_process:
            _, _, segments, *_ = inputs
            mask_bs = options["loss_mask"].cpu()
            segment_bs = segment_numbers(segments.cu_seqlens.cpu()).view_as(mask_bs)
            empty = torch.zeros(len(segments.lengths), dtype=torch.float64)
            weights = empty.index_add(0, segment_bs.flatten(), mask_bs.flatten().double())
            sums = empty.index_add(
                0, chunk.share.trained(segment_bs, mask_bs), output.detach().double().cpu())
            # Padding trains nothing, every sample something.
            self.found.losses[self._watched] = (sums / weights)[weights > 0].tolist()
        self._watched = None


def squared_gradients(model: list, optimizer) -> dict[str, float]:
    """Of every layer, or module beside the layers, this rank's part of the gradient's squared norm.

    Over all ranks they sum up to what Megatron-Core clips by: what several ranks hold is counted
    on one of them. Call it between backward and the update.
    """
    shards = {}  # of a parameter what of its gradient this rank has reduced
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter in getattr(one, "model_param_gbuf_map", ()):
            shards[parameter] = one._get_model_param_range_map(parameter)["param"]
    scale, squares = float(optimizer.get_loss_scale()), {}
    for chunk in (chunk.module for chunk in model):
        for name, parameter in _named(chunk, chunk.named_parameters()):
            if not (parameter.requires_grad and param_is_not_shared(parameter)
                    and param_is_not_tensor_parallel_duplicate(parameter)):
                continue
            gradient = parameter.main_grad.flatten()
            if model[0].ddp_config.use_distributed_optimizer:
                shard = shards.get(parameter)
                gradient = gradient[shard.start : shard.end] if shard else gradient[:0]
            elif _copy(parameter):
                continue
            layer = _LAYER.match(name)
            key = layer[1] if layer else name.rpartition(".")[0]
            square = float((gradient.double() / scale).square().sum())
            squares[key] = squares.get(key, 0.0) + square
    return squares


def _copy(parameter: torch.nn.Parameter) -> bool:
    """Whether a data-parallel rank before this one has the same gradient."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_rank(with_context_parallel=True) > 0
    return parallel_state.get_expert_data_parallel_rank() > 0


def _named(chunk: torch.nn.Module, paths: Iterable[tuple[str, object]]) -> Iterator[tuple]:
    """The same with layers counted over the whole model, not over the chunk."""
    layers = {}
    for path, module in chunk.named_modules():
        tower, _, place = path.rpartition(".")
        if place.isdigit() and tower.endswith(".layers") and hasattr(module, "layer_number"):
            layers[path] = f"{tower}.{module.layer_number - 1}"
    for path, what in paths:
        layer = _LAYER.fullmatch(path)
        if layer and layer[1] in layers:
            path = ".".join(filter(None, (layers[layer[1]], layer[2])))
        yield path, what
