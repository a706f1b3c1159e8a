"""What the ranks of a layout hold while they train, computed and not allocated; no torch.

Three kinds of tensors stay from step to step, as `training.setup` has Megatron-Core 0.16 make them:

- weights, in the dtype of training, or as the codes and scales of quantize-base;
- gradients, in fp32, or in bf16 with grad-reduce-in-bf16, in one buffer a model chunk
  (`ParamAndGradBuffer`);
- the optimizer's: Adam's two moments in fp32 and, under bf16 and fp16, the weights in fp32.

With the distributed optimizer the buffer is padded so that data and context ranks share it evenly,
the weights move into a buffer like it, and a rank has the optimizer's tensors of its share alone. A
frozen weight has neither gradient nor state. Activations, and what libraries take, come on top.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.models.common.parts import part_of
from megatron_vl.models.registry import family
from megatron_vl.ops.blockwise import quantized_bytes
from megatron_vl.parallel import LANGUAGE
from megatron_vl.peft.adapter_map import FACTORS
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.plan import Plan
from megatron_vl.weights.map import EMBEDDING, LAST_COPY, Where, volume

FP32 = 4  # bytes of a number
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = 2  # fp32 numbers of Adam's state a weight
# Of Megatron-Core's ParamAndGradBuffer under the distributed optimizer: numbers to which a weight's
# start and a bucket's end are aligned.
WEIGHT_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """One kind of weight on a rank of a chunk."""

    name: str  # Megatron-Core's; `{i}` counts the layers of the chunk, `{e}` their experts
    where: Where  # of its tower
    shape: tuple[int, ...]  # this rank's part
    layers: int  # that have it, or 1
    experts: int  # of a layer, that have it, or 1
    trained: bool
    form: str | None  # of ops.blockwise.FORMS; None: in the dtype of training
    tied_over_stages: bool  # the embedding, or its copy, while another stage has the other

    @property
    def count(self) -> int:
        return self.layers * self.experts

    @property
    def numel(self) -> int:
        return self.count * volume(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkMemory:
    """What one model chunk of a stage holds on every one of the stage's ranks."""

    stage: int
    chunk: int
    held: tuple[Held, ...]
    buffered: int  # numbers of the gradient buffer, with its padding

    @property
    def weights(self) -> int:
        return sum(one.numel for one in self.held)

    @property
    def trained(self) -> int:
        return sum(one.numel for one in self.held if one.trained)

    def kept_bytes(self, itemsize: int) -> int:
        """Of what is not trained."""
        return sum(
            one.numel * itemsize if one.form is None
            else one.count * quantized_bytes(volume(one.shape), one.form)
            for one in self.held if not one.trained
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes of a rank of one stage; its ranks are alike, to the padding of the last shares."""

    stage: int
    chunks: tuple[ChunkMemory, ...]
    weights: int  # numbers
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int  # on the device
    host_bytes: int  # of an optimizer that is offloaded, in host memory

    @property
    def device_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """Why the ranks of a replica (TP x PP) hold more than the model has."""

    model: int  # numbers of the published model
    replicated: int  # the same on several TP ranks
    padding: int  # zeros that TP needs, in the vocabulary or in a tower's MLP
    tied: int  # the embedding again, where logits are computed
    adapter: int  # factors of an adapter, on all the ranks that have them

    @property
    def total(self) -> int:
        return self.model + self.replicated + self.padding + self.tied + self.adapter


def rank_memory(plan: Plan, stage: int) -> RankMemory:
    """What every rank of a stage holds."""
    chunks = tuple(_chunk(plan, stage, chunk) for chunk in range(plan.layout.vp))
    run, options = plan.config.model, plan.config.optimizer
    itemsize = ITEMSIZE[run.dtype]
    moved, shared = 0, 0  # numbers of weights in buffers, of a rank's state
    for one in chunks:
        moved += one.buffered
        share = _shares(plan) if options.use_distributed_optimizer else 1
        shared += one.buffered // share
    master = 0 if itemsize == FP32 else 1
    state = shared * FP32 * (MOMENTS + master)
    offloaded = _offloaded(plan.config)
    return RankMemory(
        stage=stage,
        chunks=chunks,
        weights=sum(one.weights for one in chunks),
        weight_bytes=sum(one.kept_bytes(itemsize) for one in chunks) + moved * itemsize,
        gradient_bytes=moved * (itemsize if options.grad_reduce_in_bf16 else FP32),
        optimizer_bytes=round(state * (1 - offloaded)),
        # The hybrid optimizer copies the gradients of what it updates there as well.
        host_bytes=round((state + shared * FP32) * offloaded),
    )


def copies(plan: Plan) -> Copies:
    """How the numbers that a replica's ranks hold together come about."""
    counts = Counter()
    for stage in range(plan.layout.pp):
        for chunk in range(plan.layout.vp):
            counts["adapter"] += plan.layout.tp * sum(
                one.numel for one in _factors(plan, stage, chunk)
            )
            for weight, _, _ in _weights(plan, stage, chunk):
                own = sum(map(volume, weight.rule.published().values())) * len(weight.each)
                tp = 1 if _is_whole(plan, weight) or weight.rule.axis is None else plan.layout.tp
                held = volume(_shape(plan, weight)) * len(weight.each)
                once = held * tp  # on the ranks that share it
                stored = held * plan.layout.tp
                if weight.place == LAST_COPY:
                    counts["tied"] += stored
                    continue
                counts["model"] += own
                counts["padding"] += once - own
                counts["replicated"] += stored - once
    return Copies(**{name: counts[name] for name in (
        "model", "replicated", "padding", "tied", "adapter")})


def _shares(plan: Plan) -> int:
    """Ranks that share a weight's state: Megatron-Core shards it over context ranks too."""
    return plan.layout.dp * plan.layout.cp


def _offloaded(config: TrainConfig) -> float:
    options = config.optimizer
    return options.optimizer_offload_fraction if options.optimizer_cpu_offload else 0.0


def _weights(plan: Plan, stage: int, chunk: int):
    weights = family(plan.spec.model_type).weight_map(plan.spec)
    return weights.chunk_weights(plan.split, stage, chunk)


def _shape(plan: Plan, weight) -> tuple[int, ...]:
    """Of a weight on one rank: TP does not cut a vision tower whose images it divides."""
    shape, _ = weight.rule.pieces(1 if _is_whole(plan, weight) else plan.layout.tp, 0)
    return shape


def _is_whole(plan: Plan, weight) -> bool:
    return plan.layout.vit_data_parallel and part_of(weight.name) != LANGUAGE


def _chunk(plan: Plan, stage: int, chunk: int) -> ChunkMemory:
    layers = Counter()
    kinds = {}
    for weight, _, _ in _weights(plan, stage, chunk):
        layers[weight.name] += 1
        kinds.setdefault(weight.name, weight)
    split = plan.split
    tied = (plan.spec.decoder.tie_word_embeddings
            and split.embedding_chunk != (split.pp - 1, split.vp - 1))
    held = tuple(
        Held(
            name=name, where=weight.place.where, shape=_shape(plan, weight), layers=layers[name],
            experts=len(weight.each),
            trained=plan.trainable.trains(weight),
            form=plan.trainable.quantize_base if plan.trainable.quantizes(weight) else None,
            tied_over_stages=tied and weight.place in (EMBEDDING, LAST_COPY),
        )
        for name, weight in kinds.items()
    )
    held += _factors(plan, stage, chunk)
    return ChunkMemory(
        stage=stage, chunk=chunk,
        held=held,
        buffered=_buffered(plan, held),
    )


def _factors(plan: Plan, stage: int, chunk: int) -> tuple[Held, ...]:
    """An adapter's part of a chunk; layers of one kind may differ in rank."""
    found = Counter()
    adapter = plan.trainable.adapter
    for one in adapter.chunk(plan.split, stage, chunk) if adapter is not None else ():
        tp = 1 if _is_whole(plan, one.weight) else plan.layout.tp
        for factor in FACTORS:
            stored = one.stored(factor, tp=tp, rank=0, local=True)
            name = f"{one.weight.name.removesuffix('.weight')}.{FACTORS[factor]}"
            found[name, one.weight.place.where, stored.shape] += 1
    return tuple(
        Held(name=name, where=where, shape=shape, layers=layers, experts=1, trained=True,
             form=None, tied_over_stages=False)
        for (name, where, shape), layers in found.items()
    )


def _buffered(plan: Plan, held: Sequence[Held]) -> int:
    """Numbers of a chunk's gradient buffer.

    Buckets that overlapped reduction makes of it add less than one alignment each; they are left
    out.
    """
    trained = [one for one in held if one.trained]
    if not plan.config.optimizer.use_distributed_optimizer:
        return sum(one.numel for one in trained)
    # Where an embedding is tied over stages it has a bucket by itself, between those of what lies
    # before and behind it.
    buckets = [0]
    for one in trained:
        numel = one.count * _up(volume(one.shape), WEIGHT_ALIGNMENT)
        if one.tied_over_stages:
            buckets += [numel, 0]
        else:
            buckets[-1] += numel
    return sum(_up(one, math.lcm(_shares(plan), BUCKET_ALIGNMENT)) for one in buckets)


def _up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
