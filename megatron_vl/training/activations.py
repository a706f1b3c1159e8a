"""Most bytes that the activations of a microbatch take on a rank, computed and not allocated.

No torch. The formulas follow from the layers as Megatron-Core's local specs have them, in plain
torch: what autograd keeps of each operation for backward, and at the narrowest places what is
computed with it. Rows are taken to be full, all their tokens trained and, with a vision tower, all
images, up to max-patches-per-row. Kernels of a GPU (flash attention, SwiGLU in one) keep less.

Letters: T tokens of a microbatch on a rank, P patches, E width of the residual stream, Q that of
this rank's query heads, F that of its MLP, V its part of the vocabulary, z bytes of a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vl.models.common.parts import MERGER, part_of
from megatron_vl.models.common.recompute import Recompute
from megatron_vl.ops.blockwise import whole_bytes
from megatron_vl.ops.experts import ExpertsCase
from megatron_vl.parallel import LANGUAGE, VISION
from megatron_vl.peft.adapter_map import FACTORS
from megatron_vl.training.memory import FP32, ITEMSIZE, Held, RankMemory, rank_memory
from megatron_vl.training.plan import Plan

# Of the default of cross-entropy-chunks: logits are to be at most this share of a rank's memory,
# and smaller ones than this many bytes are not worth a second computation.
LOGITS_SHARE, LOGITS_FLOOR = 1 / 10, 2**28
# Tensors [T, F] beside the result: gate, value and silu; the input and its sigmoid; the input.
ACTIVATION_KEPT = {"swiglu": 3, "quick_gelu": 2, "gelu": 1, "gelu_pytorch_tanh": 1, "silu": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationMemory:
    """Bytes on a rank of one stage: the most of each moment of a step, and what is kept by then."""

    stage: int
    in_flight: float  # microbatches whose activations are kept at once
    kept: int  # of all of those, from forward to backward
    losses: int  # while logits exist; 0 but on the last stage
    layer: int  # in the backward, or the forward, of a language layer
    vision: int  # in the forward or backward of the vision tower
    embedding: int  # while the gradient of the embedding exists

    @property
    def peak(self) -> int:
        return max(self.losses, self.layer, self.vision, self.embedding)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layers:
    """The layers of a tower on one stage; sizes are a rank's."""

    count: int
    tokens: int  # T, or P
    parts: int  # that sequence parallelism cuts the residual stream into
    width: int  # E
    queries: int  # Q
    keys: int  # that of keys
    attended: int  # tensors [T, Q] that attention keeps
    qk_norms: int  # fp32 tensors [T, Q] and [T, keys] that their norms keep
    inner: int  # F; of experts, of those a token goes to together
    activation: str  # of ACTIVATION_KEPT
    passing: int  # tensors [T, F] of the MLP's forward, at most at a time
    norms: int  # fp32 tensors that a norm keeps: its input, and the normalised one if trained
    norm_copies: int  # such tensors in the backward of a norm
    trained: bool  # the weights of their own
    quantized: bool  # they are whole while they are used
    adapter: int  # bytes that the factors of one layer keep
    adapted: bool
    reached: bool  # by gradients
    recompute: Recompute
    itemsize: int
    stacked: int = 0  # bytes of the first matrix of all experts, where they are one product

    @property
    def stream(self) -> int:
        """The residual stream between two layers, all that a recomputed one keeps."""
        return self.tokens // self.parts * self.width * self.itemsize

    @property
    def inner_bytes(self) -> int:
        return self.tokens * self.inner * self.itemsize

    @property
    def layer(self) -> int:
        """All that one layer keeps.

        Norms compute in fp32. Linear layers keep their inputs, for the gradients of their weights
        or of their factors.
        """
        inputs = self.trained or self.adapted
        norms = 2 * (self.stream // self.itemsize * FP32 * self.norms + self.stream * inputs)
        attention = self.tokens * self.queries * self.itemsize * (self.attended + inputs)
        mlp = self.inner_bytes * (ACTIVATION_KEPT[self.activation] + inputs)
        return norms + self._qk_norm + attention + mlp + self.adapter

    @property
    def selective_layer(self) -> int:
        """The same, where norms, activation and attention are computed again."""
        inputs = self.trained or self.adapted
        # With fewer keys than queries, these are copied when the projection is taken apart.
        projected = self.queries * (1 + inputs + (self.keys < self.queries)) + 2 * self.keys
        first = self.inner_bytes * (2 if self.activation == "swiglu" else 1)
        return (2 * self.stream + self._qk_norm + self.tokens * projected * self.itemsize + first
                + self.adapter)

    @property
    def _qk_norm(self) -> int:
        return self.tokens * (self.queries + self.keys) * FP32 * self.qk_norms

    @property
    def kept(self) -> int:
        """From forward to backward."""
        if not self.reached:
            return 0
        how, number = self.recompute, self.recompute.num_layers
        if how.granularity == "none":
            return self.count * self.layer
        if how.granularity == "selective":
            return self.count * self.selective_layer
        if how.method == "uniform":
            return -(-self.count // number) * self.stream
        again = min(number, self.count)
        return again * self.stream + (self.count - again) * self.layer

    @property
    def working(self) -> int:
        """What one moment of the tower needs on top of that.

        In backward, what is recomputed, and the narrowest place: two gradients as wide as the MLP's
        inner state are made before what they come from is dropped, or a norm's in fp32. A trained
        weight has a gradient before that reaches its buffer; a quantised one is whole; those of
        experts are stacked, and then their gradients. Of a tower that no gradient reaches there is
        the forward alone.
        """
        if not self.count:
            return 0
        if not self.reached:
            return self.forward
        second = self.width * self.inner
        first = second * (2 if self.activation == "swiglu" else 1)
        mlp = 2 * self.stream + max(
            # What a linear layer kept for its weights or factors is gone by then.
            (2 if self.trained or self.adapted else 3) * self.inner_bytes,
            self.inner_bytes + second * self.itemsize * bool(self._beside(second)),
            self._beside(second),
            self._beside(first) - 2 * self.inner_bytes,  # what the second one kept is gone
            (self.stacked + 2 * self.inner_bytes) * bool(self.stacked),
        )
        again = {"none": 0, "selective": self.layer - self.selective_layer,
                 "full": self.layer}[self.recompute.granularity]
        if self.recompute.granularity == "full" and self.recompute.method == "uniform":
            again *= self.recompute.num_layers
        norm = self.norm_copies * self.stream // self.itemsize * FP32
        return again + max(mlp, norm)

    @property
    def forward(self) -> int:
        """What the forward of a layer needs of which nothing is kept."""
        return 4 * self.stream + self.inner_bytes * self.passing

    def _beside(self, weight: int) -> int:
        """Of a weight of so many numbers, in its layer's backward."""
        if self.quantized:
            return whole_bytes(weight, self.itemsize)
        return weight * self.itemsize if self.trained else 0


def activation_memory(
    plan: Plan, stage: int, *, chunks: int | None = None, held: RankMemory | None = None
) -> ActivationMemory:
    """What every rank of a stage needs on top of what it holds.

    Args:
        chunks: of cross-entropy; default: `cross_entropy_chunks(plan)`.
        held: `rank_memory(plan, stage)`, if that is known.
    """
    held = held or rank_memory(plan, stage)
    chunks = chunks or cross_entropy_chunks(plan)
    itemsize = ITEMSIZE[plan.config.model.dtype]
    language, vision = _language(plan, held), _vision(plan, held)
    towers = [language] + ([vision] if vision else [])
    first = stage == plan.split.embedding_chunk[0]
    last = stage == plan.layout.pp - 1
    flight = _in_flight(plan, stage)
    pixels, merger = _tower_ends(plan) if vision else (0, 0)
    # What enters a stage, unless its first layer keeps it, and what leaves it: until its gradient
    # has come.
    # Where the tower spans stages, tensors between any two could hold a row that is all images.
    sent = max(language.stream, itemsize * plan.config.batch.micro_batch_size
               * plan.spec.travelling_states(plan.split, plan.row_length))
    kept_first = plan.recompute.granularity == "full" and sent == language.stream
    borders = sent * ((not kept_first) + (not last))
    # Features that language layers are to add are kept by those that are computed again, else until
    # the forward is over; and with what enters and leaves a stage.
    travelling = plan.spec.travelling_features(plan.split) * language.stream
    borders += travelling * ((stage > plan.split.embedding_chunk[0]) + (not last))
    features = plan.spec.vision.num_features * language.stream if first and vision else 0
    if plan.recompute.granularity == "full":
        borders += features
        features = 0
    microbatch = sum(tower.kept for tower in towers) + pixels + merger + borders
    others = round((flight - 1) * microbatch)
    if stage > 0:
        # Received ahead, and the gradient that is sent back.
        others += 2 * (sent + travelling)
    # As they come, in fp32, until a stage's forward is over.
    given = _pixels(plan) * FP32 if vision and not (pixels and itemsize == FP32) else 0
    in_forward = given + language.forward if plan.recompute.granularity == "full" else 0
    losses, tied_gradient = 0, 0
    if last:
        head = _weight(held, "language_model.output_layer.weight") or _weight(
            held, "language_model.embedding.word_embeddings.weight")
        losses = others + microbatch + given + features + _head(plan, language, head, chunks)
        if head.trained and plan.spec.decoder.tie_word_embeddings and first:
            tied_gradient = _gradient(head, itemsize)  # waits for the embedding's
    in_vision = 0
    if vision:
        in_vision = others + vision.kept + pixels + vision.working + tied_gradient + (
            0 if vision.reached else given)
    in_embedding = 0
    embedding = _weight(held, "language_model.embedding.word_embeddings.weight")
    if first and embedding is not None and embedding.trained:
        in_embedding = (others + pixels + merger + (vision.kept if vision else 0) + tied_gradient
                        + _gradient(embedding, itemsize) + language.stream)
    return ActivationMemory(
        stage=stage, in_flight=flight, kept=others + microbatch, losses=losses,
        layer=others + microbatch + max(language.working + tied_gradient, in_forward),
        vision=in_vision, embedding=in_embedding,
    )


def cross_entropy_chunks(plan: Plan, *, held: RankMemory | None = None) -> int:
    """As the options say; else as few as keep the logits a small share of their rank's memory.

    Args:
        held: `rank_memory` of the last stage, if that is known.
    """
    given = plan.config.model.cross_entropy_chunks
    if given is not None:
        return given
    last = plan.layout.pp - 1
    held = held or rank_memory(plan, last)
    head = _weight(held, "language_model.output_layer.weight") or _weight(
        held, "language_model.embedding.word_embeddings.weight")
    logits = _logits(plan, head, _tokens(plan))
    if logits < LOGITS_FLOOR:
        return 1
    for chunks in range(1, _tokens(plan) + 1):
        memory = activation_memory(plan, last, chunks=chunks, held=held)
        if logits / chunks <= LOGITS_SHARE * (held.device_bytes + memory.peak):
            return chunks
    raise AssertionError("one position's logits are less than a tenth of the weights they are of")


def _in_flight(plan: Plan, stage: int) -> float:
    """Microbatches whose forward is done and whose backward is not, at most, in Megatron-Core's
    1F1B; of virtual stages, whose chunks are counted one by one, the mean over the chunks."""
    pp, vp, number = plan.layout.pp, plan.layout.vp, plan.num_microbatches
    if vp == 1:
        return min(pp - stage, number)
    return min(2 * (pp - stage - 1) + (vp - 1) * pp + 1, number * vp) / vp


# ---- sizes -------------------------------------------------------------------------------------


def _tokens(plan: Plan) -> int:
    """Of a microbatch on a rank."""
    return plan.config.batch.micro_batch_size * plan.row_length // plan.layout.cp


def _patches(plan: Plan) -> int:
    """Of rows that are all images, on a rank; images are taken to be divided evenly."""
    vision, rows = plan.spec.vision, plan.config.batch.micro_batch_size
    grid = vision.smallest_grid
    patches = -(-plan.row_length // vision.num_tokens(grid)) * math.prod(grid)
    limit = plan.config.data.max_patches_per_row or patches
    return -(-rows * min(patches, limit) // plan.layout.media_ranks)


def _pixels(plan: Plan) -> int:
    return _patches(plan) * plan.spec.vision.patch_dim


def _language(plan: Plan, held: RankMemory) -> _Layers:
    decoder, layout, tp = plan.spec.decoder, plan.layout, plan.layout.tp
    experts = decoder.experts
    inner = decoder.ffn_hidden_size if experts is None else (
        experts.per_token * experts.ffn_hidden_size)
    trained = LANGUAGE not in plan.trainable.frozen
    # Of segments of several lengths, q, k and v are kept as turned and in rectangles of like
    # length, and the output in these and in order. Keys and values of groups are repeated for every
    # head at once; otherwise they are parts of the projection, which is kept with them.
    grouped = decoder.num_query_groups < decoder.num_attention_heads
    return _layers(
        plan, held, LANGUAGE, plan.recompute, width=decoder.hidden_size,
        tokens=_tokens(plan), parts=tp if layout.sequence_parallel else 1,
        queries=decoder.num_attention_heads * decoder.head_dim // tp,
        keys=-(-decoder.num_query_groups // tp) * decoder.head_dim,
        attended=5 if grouped else 9, qk_norms=decoder.qk_norm * (1 + trained),
        inner=inner // tp, activation="swiglu", passing=4, norms=1 + trained, norm_copies=5,
        stacked=_stacked(plan),
    )


def _stacked(plan: Plan) -> int:
    """Of the gates and up projections of a layer's experts on a rank, if a GPU has them so."""
    way, decoder, layout = plan.experts_way(ExpertsCase), plan.spec.decoder, plan.layout
    if way is None or not way.grouped:
        return 0
    first = 2 * decoder.experts.ffn_hidden_size // layout.expert_tp * decoder.hidden_size
    return decoder.experts.count // layout.ep * first * ITEMSIZE[plan.config.model.dtype]


def _vision(plan: Plan, held: RankMemory) -> _Layers | None:
    """None on a stage without vision layers."""
    vision, tp = plan.spec.vision, plan.layout.vit_tp
    if vision is None or not any(
        plan.split.layers(VISION, held.stage, chunk) for chunk in range(plan.layout.vp)
    ):
        return None
    # Frames of one size are a rectangle as they are.
    return _layers(
        plan, held, VISION, plan.vit_recompute, width=vision.hidden_size,
        tokens=_patches(plan), parts=1, queries=vision.hidden_size // tp,
        keys=vision.hidden_size // tp, attended=5, qk_norms=0, inner=vision.ffn_hidden_size // tp,
        activation="swiglu" if vision.gated else vision.activation,
        passing=6 if vision.gated else 4,  # a bias makes another tensor
        norms=1, norm_copies=2,
    )


def _layers(plan: Plan, held: RankMemory, part: str, recompute: Recompute, **sizes) -> _Layers:
    count = sum(len(plan.split.layers(part, held.stage, chunk)) for chunk in range(plan.layout.vp))
    trainable = plan.trainable
    trained, adapted = part not in trainable.frozen, part in trainable.adapted
    # Gradients reach the language layers for whatever is trained before them.
    reached = trained or adapted or part == LANGUAGE
    itemsize = ITEMSIZE[plan.config.model.dtype]
    return _Layers(
        count=count, recompute=recompute, trained=trained, adapted=adapted, reached=reached,
        quantized=part == LANGUAGE and trainable.quantize_base is not None,
        adapter=_factors(plan, held, part, sizes["tokens"]) * itemsize // max(count, 1),
        itemsize=itemsize, **sizes,
    )


def _factors(plan: Plan, held: RankMemory, part: str, tokens: int) -> int:
    """Numbers that the factors of a stage keep: A x, the B that is made of what is stored, and what
    dropout drew."""
    found = {}
    for one in (one for chunk in held.chunks for one in chunk.held if part_of(one.name) == part):
        for factor, leaf in FACTORS.items():
            if one.name.endswith(f".{leaf}"):
                found.setdefault(one.name.removesuffix(leaf), {})[factor] = one
    numbers = 0
    for pair in found.values():
        (rank, width), (rows, _) = pair["A"].shape, pair["B"].shape
        drawn = tokens * width if plan.config.lora.lora_dropout else 0
        numbers += pair["A"].layers * (tokens * rank + rows * rank + drawn)
    return numbers


# ---- ends --------------------------------------------------------------------------------------


def _weight(held: RankMemory, name: str) -> Held | None:
    return next((one for chunk in held.chunks for one in chunk.held if one.name == name), None)


def _gradient(weight: Held, itemsize: int) -> int:
    """Of a matrix over the vocabulary, before it reaches its buffer."""
    return weight.numel * itemsize


def _logits(plan: Plan, head: Held, positions: int) -> int:
    """Bytes of their logits: in fp32, and in 16 bits before or, as their gradient, after that."""
    itemsize = ITEMSIZE[plan.config.model.dtype]
    return positions * head.shape[0] * (FP32 + (itemsize if itemsize < FP32 else 0))


def _head(plan: Plan, language: _Layers, head: Held, chunks: int) -> int:
    """The last norm, the trained positions, and their logits, of a part at a time."""
    itemsize, tokens = language.itemsize, language.tokens
    norm = language.stream // itemsize * FP32 * language.norms + language.stream
    gathered = tokens * language.width * itemsize * (1 + (language.parts > 1))
    weight = _gradient(head, itemsize) if head.trained else 0
    logits = _logits(plan, head, -(-tokens // chunks))
    if chunks > 1:
        most = logits + weight
    else:
        most = max(logits, tokens * head.shape[0] * itemsize + weight)
    if plan.spec.decoder.normalized_head:
        # The normalised weight; in its backward also its gradient, and three more as large.
        most = max(most + _gradient(head, itemsize), 5 * weight)
    return norm + gathered + most


def _tower_ends(plan: Plan) -> tuple[int, int]:
    """What the patch embedding keeps, and the norm before the merger with the merger."""
    vision, itemsize = plan.spec.vision, ITEMSIZE[plan.config.model.dtype]
    trainable = plan.trainable
    pixels = 0 if VISION in trainable.frozen else _pixels(plan) * itemsize
    trained = MERGER not in trainable.frozen or MERGER in trainable.adapted
    if not trained and VISION in trainable.still:
        return pixels, 0
    inner = _patches(plan) * vision.hidden_size * (1 + vision.num_features)  # of every merger
    return pixels, inner * FP32 + inner * itemsize * (1 + 2 * trained) // plan.layout.vit_tp
