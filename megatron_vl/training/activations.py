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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import add, mul

from megatron_vl.models.common.parts import MERGER
from megatron_vl.parallel import LANGUAGE, VISION, in_flight
from megatron_vl.training.layer_activations import (
    Layers,
    count_patches,
    count_tokens,
    language_layers,
    microbatch_patches,
    vision_layers,
)
from megatron_vl.training.memory import FP32, ITEMSIZE, Held, RankMemory, rank_memory
from megatron_vl.training.plan import Plan

# Of the default of cross-entropy-chunks: logits are to be at most this share of a rank's memory,
# and smaller ones than this many bytes are not worth a second computation.
LOGITS_SHARE, LOGITS_FLOOR = 1 / 10, 2**28
EMBEDDING = "language_model.embedding.word_embeddings.weight"


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
    itemsize, layout = ITEMSIZE[plan.config.model.dtype], plan.layout
    language, vision = language_layers(plan, held), vision_layers(plan, held)
    own, embeds = range(layout.vp), plan.split.embedding_chunk
    # Features that language layers are to add travel beside what enters and leaves a chunk.
    travelling = plan.spec.travelling_features(plan.split) * language.stream
    kept = [_kept(plan, stage, chunk, language, vision, travelling) for chunk in own]
    # What repeats after three groups of microbatches holds no more then.
    flights = in_flight(stage, p=layout.pp, v=layout.vp,
                        m=min(plan.num_microbatches, 3 * layout.pp))
    ends = (layout.pp - 1, layout.vp - 1)
    sent = _sent(plan, language) + travelling
    # What sequence parallelism gathers for linear layers, in a buffer that stays.
    always = (language.parts > 1 and language.trained) * language.parts * language.stream

    def others(chunk: int, cases: Iterable[Sequence[int]]) -> int:
        """Of other microbatches, and sent between stages, while a chunk works."""
        return always + max(sum(map(mul, case, (*kept, sent))) for case in cases) - kept[chunk]

    before = [others(chunk, flights[chunk].forward) for chunk in own]
    beside = [others(chunk, flights[chunk].backward) for chunk in own]
    given = [_given(plan) if vision and (stage, chunk) == (0, 0) else 0 for chunk in own]
    head = _head_weight(held) if stage == layout.pp - 1 else None
    embedding = _weight(held, EMBEDDING) if stage == embeds[0] else None
    losses = in_vision = in_embedding = tied_gradient = left = 0
    if (embedding is not None and not embedding.trained and language.adapted
            and not any(_reached(plan)) and plan.num_microbatches > 1):
        # What entered the layers last, whole under sequence parallelism, and its gradient, until
        # the next forward is over.
        left = (language.parts + 1) * language.stream
    elif stage == 0 and vision and vision.adapted and plan.num_microbatches > 1:
        left = 2 * vision.stream  # the same of the tower's
    if head is not None:
        forward, backward = _head(plan, language, head, chunks)
        losses = kept[-1] + max(before[-1] + given[-1] + left + forward, beside[-1] + backward)
        if embedding is not None and plan.spec.decoder.tie_word_embeddings and head.trained:
            tied_gradient = _gradient(head, itemsize)  # waits for the embedding's
        if embedding is not None and plan.recompute.granularity != "full":
            losses += _features(plan, language)
    for chunk in own if vision else ():
        pixels = _pixels(plan, stage, chunk)
        # Of pixels as they come, those that this rank sees, where nothing keeps them.
        taken = _own_pixels(plan) * (given[chunk] > 0 == pixels and layout.media_ranks > 1)
        in_vision = max(in_vision, vision.kept(chunk) + pixels + max(
            beside[chunk] + vision.working(chunk),
            before[chunk] + given[chunk] + taken + left * (not vision.adapted)
            + vision.forward(chunk)))
    if embedding is not None and embedding.trained:
        chunk = embeds[1]
        in_embedding = (
            beside[chunk] + _vision_kept(plan, stage, chunk, vision)
            # With a tied one's their sum, which is neither of them.
            + tied_gradient + _gradient(embedding, itemsize) * (2 if tied_gradient else 1)
            + language.stream * (language.counts[chunk] > 0)  # else that which has come
            + _media_gradient(plan, language)
        )
    return ActivationMemory(
        stage=stage,
        in_flight=max(
            sum(case[:-1]) for one in flights for case in one.forward + one.backward) / layout.vp,
        kept=max(map(add, beside, kept)),
        losses=losses,
        layer=max(
            kept[chunk]
            + max(beside[chunk] + language.working(chunk, arrived=arrived) + tied_gradient
                  + arrived * _unpacked(plan, stage, chunk, language),
                  before[chunk] + given[chunk] + left + language.forward(chunk))
            for chunk, arrived in ((chunk, (stage, chunk) != ends) for chunk in own)
        ),
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
    head = _head_weight(held)
    logits = _logits(plan, head, count_tokens(plan))
    if logits < LOGITS_FLOOR:
        return 1
    for chunks in range(1, count_tokens(plan) + 1):
        memory = activation_memory(plan, last, chunks=chunks, held=held)
        if logits / chunks <= LOGITS_SHARE * (held.device_bytes + memory.peak):
            return chunks
    raise AssertionError("one position's logits are less than a tenth of the weights they are of")


# ---- what is kept ------------------------------------------------------------------------------


def _kept(
    plan: Plan, stage: int, chunk: int, language: Layers, vision: Layers | None, travelling: int
) -> int:
    """Of a chunk's microbatch, from its forward to its backward."""
    place, embeds = (stage, chunk), plan.split.embedding_chunk
    last = place == (plan.layout.pp - 1, plan.layout.vp - 1)
    full, sent = plan.recompute.granularity == "full", _sent(plan, language)
    # What enters, unless the first layer keeps it or a copy of an embedding that is trained, and
    # what leaves: until its gradient has come.
    made_here = place == embeds and not language.adapted and language.counts[chunk]
    entered = not made_here and not (
        language.keeps_input(chunk) and sent == language.stream)
    borders = sent * (entered + (not last))
    borders += travelling * ((place[::-1] > embeds[::-1]) + (not last))
    if place == embeds:
        # Sequence parallelism takes a view of the whole row's embeddings.
        borders += language.stream * (language.parts - 1)
        # Features to be added are kept by layers that are computed again, else until the forward
        # is over.
        borders += _features(plan, language) * full
    return language.kept(chunk) + _vision_kept(plan, stage, chunk, vision) + borders


def _unpacked(plan: Plan, stage: int, chunk: int, language: Layers) -> int:
    """In a chunk's backward, a copy of what is needed of the gradient that has come, where states
    are sent with features or padded; and the gradients of the features that entered."""
    packed = plan.split.encoders_span or plan.spec.travelling_features(plan.split)
    if not packed or not language.counts[chunk]:
        return 0
    if (stage, chunk) == plan.split.embedding_chunk or not plan.spec.vision.num_features:
        return language.stream
    start = plan.split.layers(LANGUAGE, stage, chunk).start
    return language.stream * (1 + max(0, plan.spec.vision.num_features - start))


def _sent(plan: Plan, language: Layers) -> int:
    """Of a tensor between two stages, features aside.

    Where the tower spans stages, it could hold a row that is all images.
    """
    return max(language.stream, language.itemsize * plan.config.batch.micro_batch_size
               * plan.spec.travelling_states(plan.split, plan.row_length))


def _vision_kept(plan: Plan, stage: int, chunk: int, vision: Layers | None) -> int:
    """The vision tower's part of that."""
    if vision is None:
        return 0
    merger = _merger(plan) if (stage, chunk) == plan.split.embedding_chunk else 0
    # Whose gradient asks for those of the factors.
    entered = vision.stream * (
        (stage, chunk) == (0, 0) and vision.adapted and not vision.keeps_input(chunk))
    return vision.kept(chunk) + _pixels(plan, stage, chunk) + entered + merger


def _features(plan: Plan, language: Layers) -> int:
    """Of a tower whose features language layers add."""
    return plan.spec.vision.num_features * language.stream if plan.spec.vision else 0


def _pixels(plan: Plan, stage: int, chunk: int) -> int:
    """What the patch embedding keeps."""
    if (stage, chunk) != (0, 0) or VISION in plan.trainable.frozen:
        return 0
    return _own_pixels(plan)


def _own_pixels(plan: Plan) -> int:
    return count_patches(plan) * plan.spec.vision.patch_dim * ITEMSIZE[plan.config.model.dtype]


def _given(plan: Plan) -> int:
    """Pixels as they come: of the whole microbatch, until a chunk's forward is over."""
    if plan.layout.media_ranks == 1 and _pixels(plan, 0, 0):
        return 0  # these are what is kept
    numbers = microbatch_patches(plan) * plan.spec.vision.patch_dim
    return numbers * ITEMSIZE[plan.config.model.dtype]


def _media_gradient(plan: Plan, language: Layers) -> int:
    """Of images' embeddings and features, which waits for that of the embedding."""
    vision = plan.spec.vision
    if not any(_reached(plan)):
        return 0
    grid = vision.smallest_grid
    patches = microbatch_patches(plan) // plan.layout.cp
    tokens = min(count_tokens(plan), patches * vision.num_tokens(grid) // math.prod(grid))
    return tokens * language.width * language.itemsize * (1 + vision.num_features)


def _reached(plan: Plan) -> tuple[bool, bool]:
    """Whether the merger is trained, and whether what it merges has a gradient; if there is one."""
    trainable, there = plan.trainable, plan.spec.vision is not None
    return (there and (MERGER not in trainable.frozen or MERGER in trainable.adapted),
            there and VISION not in trainable.still)


def _merger(plan: Plan) -> int:
    """What the norm before it and itself keep."""
    vision, trainable = plan.spec.vision, plan.trainable
    itemsize = ITEMSIZE[plan.config.model.dtype]
    trained, reached = _reached(plan)
    if not trained and not reached:
        return 0
    if vision.only_grid:
        return _resampler(plan)
    inner = count_patches(plan) * vision.hidden_size
    # The norm before it is the tower's, those of features their mergers'.
    rms = vision.normalization == "RMSNorm" and VISION not in trainable.frozen
    norms = inner * FP32 * (1 + rms) * reached
    # In fp32 that is no copy.
    copies = itemsize < FP32 and (reached or MERGER not in trainable.frozen)
    norms += inner * FP32 * vision.num_features * copies
    mergers = inner * (1 + vision.num_features)
    return norms + mergers * itemsize * trained + mergers * itemsize * (
        1 + trained) // plan.layout.vit_tp


def _resampler(plan: Plan) -> int:
    """What a resampler keeps, with the norms before and behind it and before the tower.

    Of patches the inputs of both norms (fp32) and of the projection to the language width, and
    there values, keys and what attention takes of them; of its queries what attention gives and the
    last norm; and its weights of queries, keys and values, which are copied out of one. Inputs are
    for the gradients of its own weights, copies of weights for those of what they multiply.
    """
    vision, tp, trainable = plan.spec.vision, plan.layout.vit_tp, plan.trainable
    itemsize, width = ITEMSIZE[plan.config.model.dtype], vision.out_hidden_size
    own, before = MERGER not in trainable.frozen, VISION not in trainable.frozen
    through = own or _reached(plan)[1]  # its attention, and not only the projection behind that
    patches = count_patches(plan)
    images = patches // math.prod(vision.only_grid)
    queries = images * vision.num_tokens(vision.only_grid)
    return (patches * vision.hidden_size * (FP32 * before + itemsize * own)
            + patches * width * through * (FP32 + 2 * itemsize * own + 2 * itemsize // tp)
            + queries * width * (FP32 + itemsize * own + itemsize // tp)
            + (2 * through + own) * width * width // tp * itemsize)


# ---- ends --------------------------------------------------------------------------------------


def _weight(held: RankMemory, name: str) -> Held | None:
    return next((one for chunk in held.chunks for one in chunk.held if one.name == name), None)


def _head_weight(held: RankMemory) -> Held:
    return _weight(held, "language_model.output_layer.weight") or _weight(held, EMBEDDING)


def _gradient(weight: Held, itemsize: int) -> int:
    """Of a matrix over the vocabulary, before it reaches its buffer."""
    return weight.numel * itemsize


def _logits(plan: Plan, head: Held, positions: int) -> int:
    """Bytes of their logits: in fp32, and in 16 bits before or, as their gradient, after that."""
    itemsize = ITEMSIZE[plan.config.model.dtype]
    return positions * head.shape[0] * (FP32 + (itemsize if itemsize < FP32 else 0))


def _head(plan: Plan, language: Layers, head: Held, chunks: int) -> tuple[int, int]:
    """The last norm, the trained positions, and their logits, of a part at a time.

    In the forward, and in the backward.
    """
    itemsize, tokens = language.itemsize, language.tokens
    norm = language.stream // itemsize * FP32 * language.norms + language.stream
    gathered = tokens * language.width * itemsize * (1 + (language.parts > 1))
    weight = _gradient(head, itemsize) if head.trained else 0
    forward = logits = _logits(plan, head, -(-tokens // chunks))
    forward += gathered
    # Of parts, the backward makes the logits again.
    backward = gathered + weight + (logits if chunks > 1 else tokens * head.shape[0] * itemsize)
    if plan.spec.decoder.normalized_head:
        # The normalised weight; in its backward, which comes after that of what is gathered, also
        # its gradient, and three more as large.
        forward += _gradient(head, itemsize)
        backward = max(backward + _gradient(head, itemsize), 5 * weight)
    return norm + forward, norm + backward
