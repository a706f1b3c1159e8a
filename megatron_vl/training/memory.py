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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_vl.models.common.parts import part_of
from megatron_vl.models.registry import family
from megatron_vl.models.spec import ModelSpec
from megatron_vl.ops.blockwise import quantized_bytes
from megatron_vl.parallel import LANGUAGE, Shard
from megatron_vl.peft.adapter_map import FACTORS
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.plan import Plan
from megatron_vl.weights.map import EMBEDDING, LAST_COPY, WeightMap, Where, volume

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
    experts: int  # of a layer, that have it on this rank, or 1
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
class Buffer:
    """The gradients of a chunk that the same ranks sum."""

    numel: int  # with its padding
    shares: int  # ranks that have a part of the optimizer's state each, under the distributed one


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkMemory:
    """What one model chunk of a stage holds on every one of the stage's ranks."""

    stage: int
    chunk: int
    held: tuple[Held, ...]
    buffers: tuple[Buffer, ...]  # experts that are divided over ranks have one of their own

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
    """Why ranks that hold every part of a model, one a part, hold more than the model has."""

    model: int  # numbers of the published model
    replicated: int  # the same in several parts of a stage, of TP ranks or of ranks of experts
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
    buffers = [buffer for one in chunks for buffer in one.buffers]
    moved = sum(one.numel for one in buffers)
    shared = sum(one.numel // (one.shares if options.use_distributed_optimizer else 1)
                 for one in buffers)  # numbers of a rank's state
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
    """How the numbers that ranks of every part hold together come about."""
    counts, parts = Counter(), len(plan.layout.shards)
    for stage in range(plan.layout.pp):
        for chunk in range(plan.layout.vp):
            counts["adapter"] += parts * sum(
                one.numel for one in _factors(plan, stage, chunk)
            )
            for weight, _, _ in _weights(plan, stage, chunk):
                own = sum(map(volume, weight.rule.published().values())) * len(weight.each)
                each, tp = volume(_shape(plan, weight)), _tp_of(plan, weight)
                # On the ranks that share it.
                once = each * len(weight.each) * (1 if weight.rule.axis is None else tp)
                stored = each * _experts(plan, weight) * parts
                if weight.place == LAST_COPY:
                    counts["tied"] += stored
                    continue
                counts["model"] += own
                counts["padding"] += once - own
                counts["replicated"] += stored - once
    return Copies(**{name: counts[name] for name in (
        "model", "replicated", "padding", "tied", "adapter")})


def _offloaded(config: TrainConfig) -> float:
    options = config.optimizer
    return options.optimizer_offload_fraction if options.optimizer_cpu_offload else 0.0


def _weights(plan: Plan, stage: int, chunk: int):
    return _weight_map(plan.spec).chunk_weights(plan.split, stage, chunk)


@lru_cache(maxsize=1)
def _weight_map(spec: ModelSpec) -> WeightMap:
    return family(spec.model_type).weight_map(spec)


def _shape(plan: Plan, weight) -> tuple[int, ...]:
    """Of a weight on one rank."""
    shape, _ = weight.rule.pieces(_tp_of(plan, weight), 0)
    return shape


def _tp_of(plan: Plan, weight) -> int:
    """Ranks that share a weight: TP does not cut a vision tower whose images it divides."""
    return 1 if _is_whole(plan, weight) else weight.tp_of(plan.layout, Shard())[0]


def _experts(plan: Plan, weight) -> int:
    """Experts of a layer that have it on one rank, or 1."""
    return len(weight.held(plan.layout, Shard()))


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
            experts=_experts(plan, weight),
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
        buffers=tuple(_buffers(plan, held)),
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


def _buffers(plan: Plan, held: Sequence[Held]) -> Iterator[Buffer]:
    """A chunk's gradient buffers: that of experts which are divided over ranks, and the others'."""
    layout = plan.layout
    trained = [one for one in held if one.trained]
    divided = [one for one in trained if layout.ep > 1 and "{e}" in one.name]
    whole = [one for one in trained if one not in divided]
    # Megatron-Core shards the optimizer's state over context ranks too.
    for those, shares in ((whole, layout.dp * layout.cp), (divided, layout.expert_dp)):
        yield Buffer(numel=_buffered(plan, those, shares), shares=shares)


def _buffered(plan: Plan, trained: Sequence[Held], shares: int) -> int:
    """Numbers of a gradient buffer.

    Buckets that overlapped reduction makes of it add less than one alignment each; they are left
    out.
    """
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
    return sum(_up(one, math.lcm(shares, BUCKET_ALIGNMENT)) for one in buckets)


def _up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
