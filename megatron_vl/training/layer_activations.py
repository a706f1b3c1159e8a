"""Bytes that a tower's layers on a stage keep from forward to backward, and work with; no torch.

Of every operation the formulas count what autograd keeps of it for backward.

Letters: T tokens of a microbatch on a rank, P patches, E width of the residual stream, Q that of
this rank's query heads, F that of its MLP, z bytes of a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vl.models.common.parts import part_of
from megatron_vl.models.common.recompute import Recompute
from megatron_vl.ops.blockwise import whole_bytes
from megatron_vl.ops.experts import ExpertsCase
from megatron_vl.parallel import LANGUAGE, VISION
from megatron_vl.peft.adapter_map import FACTORS
from megatron_vl.training.memory import FP32, ITEMSIZE, Held, RankMemory
from megatron_vl.training.plan import Plan

# Tensors [T, F] beside the result: gate, value and silu; the input and its sigmoid; the input.
ACTIVATION_KEPT = {"swiglu": 3, "quick_gelu": 2, "gelu": 1, "gelu_pytorch_tanh": 1, "silu": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """The layers of a tower on one stage; sizes are a rank's."""

    counts: tuple[int, ...]  # of every chunk
    tokens: int  # T, or P
    parts: int  # that sequence parallelism cuts the residual stream into
    width: int  # E
    queries: int  # Q
    keys: int  # that of keys
    attended: int  # tensors [T, Q] that attention keeps
    keeps_projection: bool  # as values are parts of it
    qk_norms: int  # fp32 tensors [T, Q] and [T, keys] that their norms keep
    inner: int  # F; of experts, of those a token goes to together
    activation: str  # of ACTIVATION_KEPT
    passing: int  # tensors [T, F] of the MLP's forward, at most at a time
    biased: bool  # the linear layers of the MLP: its first one's output lies beside the sum
    norms: int  # fp32 tensors that a norm keeps: its input, and the normalised one if trained
    norm_copies: int  # such tensors in the backward of a norm
    trained: bool  # the weights of their own
    quantized: bool  # they are whole while they are used
    adapter: int  # bytes that the factors of one layer keep
    adapted: bool
    mlp_adapted: bool  # by factors of its own
    reached: bool  # by gradients
    recompute: Recompute
    itemsize: int
    head_dim: int
    others: int = 0  # width of other ranks' q, k, v, gathered where there are fewer groups than TP
    dispatched: int = 0  # bytes of the tokens that come to a rank's experts; 0: there are none
    experts: int = 0  # of a layer
    own_experts: int = 0  # of them, on a rank
    per_token: int = 0  # that a token goes to
    sharing: int = 1  # ranks that share an expert
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
        norms = 2 * self.norm
        norms += self.stream * (inputs + (bool(self.dispatched) or self.mlp_inputs))
        attention = self.tokens * self.queries * self.itemsize * (self.attended + inputs)
        if self.keeps_projection or (self.qk_norms and self.itemsize == FP32):
            attention += self.tokens * self.others * self.itemsize
        attention += self.tokens * self.queries // self.head_dim * FP32  # log-sum-exps
        return norms + self._qk_norm + attention + self.mlp + self.adapter

    @property
    def mlp(self) -> int:
        """The linear layers' part of that.

        Of experts the first one's input is a copy of every token for each of its experts, beside
        that of the router, and what the activation gives is kept for the router's weights.
        """
        kept = ACTIVATION_KEPT[self.activation] + self.mlp_inputs + bool(self.dispatched)
        return self.inner_bytes * kept + self.dispatched * self.mlp_inputs + self.routing

    @property
    def routing(self) -> int:
        """What the router keeps of a layer, and the way of tokens to experts.

        Of every token its experts and its place with each (int64), their weights before and after
        tokens are sorted; of every expert the weights and whether tokens chose it.
        """
        a_token = (8 + 8 + FP32 + FP32 * self.sharing) * self.per_token + (FP32 + 1) * self.experts
        return self.tokens // self.parts * a_token

    @property
    def mlp_inputs(self) -> bool:
        """Whether its linear layers keep them."""
        return self.trained or self.mlp_adapted

    @property
    def selective_layer(self) -> int:
        """The same, where norms, activation and attention are computed again."""
        inputs = self.trained or self.adapted
        # Values are part of the projection, or of the gathered one, beside which queries and keys
        # lie once they are normalised.
        queries, keys = 1 + self._copies_queries, 2
        if self.qk_norms:
            queries, keys = (1, 1) if self.itemsize == FP32 else (2, 3)
        projected = self.queries * (queries + inputs) + self.keys * keys + self.others
        return (2 * self.stream + self._qk_norm + self.tokens * projected * self.itemsize
                + self.first + self.dispatched * self.mlp_inputs + self.routing + self.adapter)

    @property
    def _copies_queries(self) -> bool:
        """Whether those of several groups are copied when the projection is taken apart."""
        return self.head_dim < self.keys < self.queries

    @property
    def first(self) -> int:
        """What the first linear layer gives."""
        return self.inner_bytes * (2 if self.activation == "swiglu" else 1)

    def keeps_input(self, chunk: int) -> bool:
        """Whether the first layer of a chunk keeps what enters it, and no copy of that."""
        return self.counts[chunk] > 0 and (
            self.recompute.granularity != "none" or self.itemsize == FP32)

    @property
    def _shared(self) -> int:
        """What a norm keeps of its input where that is no copy, for it is in fp32 already."""
        return self.stream * (self.itemsize == FP32)

    @property
    def norm(self) -> int:
        """What a norm keeps beside its output."""
        return self.tokens // self.parts * FP32 * (self.width * self.norms + 1)

    @property
    def _qk_norm(self) -> int:
        normed = self.tokens * (self.queries + self.keys) * FP32 * self.qk_norms
        if self.qk_norms:
            normed += self.tokens * (self.queries + self.keys) // self.head_dim * FP32
        if self.qk_norms and self.itemsize == FP32:
            # The keys are not copied then, and the projection that they are part of is kept.
            normed += self.tokens * (self.keys + self.queries * self._copies_queries) * FP32
        return normed

    def kept(self, chunk: int) -> int:
        """From forward to backward, of a chunk's layers, with the cosines and sines of positions.
        """
        count = self.counts[chunk]
        if not self.reached or not count:
            return 0
        how, number = self.recompute, self.recompute.num_layers
        rotary = self.tokens * self.head_dim * self.itemsize
        if how.granularity == "none":
            return rotary + count * self.layer
        if how.granularity == "selective":
            return rotary + count * self.selective_layer
        if how.method == "uniform":
            return rotary + -(-count // number) * self.stream
        again = min(number, count)
        return rotary + again * self.stream + (count - again) * self.layer

    def working(self, chunk: int, *, arrived: bool = False) -> int:
        """What one moment of a chunk needs on top of that.

        Args:
            arrived: whether the gradient of its output has come from elsewhere, and counts there.

        In backward, what is recomputed, and the narrowest place: two gradients as wide as the MLP's
        inner state are made before what they come from is dropped, or a norm's in fp32, when what
        the last MLP kept is gone. Layers that are not recomputed come first. A trained
        weight has a gradient before that reaches its buffer; a quantised one is whole; those of
        experts are stacked, and then their gradients. Of a tower that no gradient reaches there is
        the forward alone.
        """
        if not self.counts[chunk]:
            return 0
        if not self.reached:
            return self.forward(chunk)
        selective = self.recompute.granularity == "selective"
        second = self.width * self.inner
        first = second * (2 if self.activation == "swiglu" else 1)
        whole = self._recomputes_last(chunk)
        # The gradient of the output; of what is computed again its output, or its norm's again.
        streams = (1 - arrived + (selective or whole)) * self.stream
        gathered = self.parts * self.stream * (self.parts > 1)
        mlp = streams + max(
            # What a linear layer kept for its weights or factors is gone by then.
            (4 if selective else 2 if self.mlp_inputs else 3) * self.inner_bytes + self.weighing,
            # With what sequence parallelism gathers of the output's gradient.
            self.inner_bytes + second * self.itemsize * bool(self._beside(second)) + gathered,
            self._beside(second),
            # With the gradient of its input, when what the second one kept is gone; a quantised
            # weight takes most before that is made.
            self._beside(first) - 2 * self.inner_bytes + (self.stream + gathered) * self.trained,
            (self.stacked + 2 * self.inner_bytes) * bool(self.stacked),
            # In the forward that is run again: at the end of experts, or at either product.
            max(self.combined, *self._products) * whole,
        )
        attention = again = 0
        if selective:
            # The norm before either half is computed again, then the activation and what it gave,
            # or attention, beside four gradients as wide, when what the MLP kept is gone. Of gates
            # and values with a bias the sum is made as well.
            summed = self.biased and self.activation == "swiglu"
            normed = self.norm + self.stream - self._shared
            again = normed + (2 + summed) * self.inner_bytes
            attention = (
                normed + self.stream + (min(self.attended, 7) + 4) * self.tokens * self.queries
                * self.itemsize - self.first - self.dispatched * self.mlp_inputs
            )
        elif whole:
            uniform = self.recompute.method == "uniform"
            again = self.layer * (self.recompute.num_layers if uniform else 1) - self._shared
        numbers = self.stream // self.itemsize
        # What it gave, and normalised before its weight was applied, is gone as well.
        norm = streams + (self.norm_copies - self.norms + 1) * numbers * FP32
        norm -= self.stream * self.mlp_inputs
        norm -= self.first + 2 * self.inner_bytes if selective else self.mlp
        return max(again + max(mlp, norm), attention)

    def forward(self, chunk: int) -> int:
        """What the forward of a layer needs beside what is kept.

        Where its activations are: what entered the layer, the sum of that with attention, and what
        the MLP gives, or the experts.
        """
        if not self.counts[chunk]:
            return 0
        combined = 2 * self.stream + self.combined
        if self.reached and self.recompute.granularity == "selective":
            # What enters the layer and its sum with attention are kept, a norm's output is not.
            return self.stream + max(
                self.stream, self.inner_bytes * self.passing - self.first, self.combined)
        if self.reached and not self._recomputes_last(chunk):
            return max(3 * self.stream + self.first * self.biased, combined) - 2 * self._shared
        return max(4 * self.stream + self.inner_bytes * self.passing, combined)

    @property
    def combined(self) -> int:
        """At the end of experts, if there are any: what they take; what they give, one by one and
        together or sorted, or that in fp32 and summed over those who share them."""
        if not self.dispatched:
            return 0
        several, summed = self.own_experts > 1, 0
        if self.sharing > 1:
            numbers = self.dispatched // self.itemsize * FP32
            summed = numbers * (self.itemsize < FP32) + numbers // self.sharing
        return self.taken + (1 + several) * self.dispatched + summed

    @property
    def taken(self) -> int:
        """By experts: the tokens that went out, those that came of other ranks, and sorted ones,
        which are alive to the end whether they are kept or not."""
        ways = 1 + (self.own_experts < self.experts)
        if self.own_experts == 1 == self.sharing:
            ways -= 1  # what came is what the expert takes
        return ways * self.dispatched // self.sharing + self.dispatched * (not self.mlp_inputs)

    @property
    def _products(self) -> tuple[int, int]:
        """What experts take and the weights of one product, and what that gives; at the first, less
        what is kept once the second is there."""
        if not self.stacked:
            return 0, 0
        kept = self.inner_bytes * (ACTIVATION_KEPT[self.activation] + 1)
        return (self.taken + self.stacked + self.first - kept,
                self.taken + self.inner_bytes * (not self.mlp_inputs) + self.stacked // 2
                + self.dispatched)

    @property
    def weighing(self) -> int:
        """In the backward of the router's weights, gradients in fp32 of what they weighed, of all
        experts at once where these are one product."""
        at_once = self.own_experts == 1 or self.stacked > 0
        return 4 * self.inner_bytes * (at_once and self.itemsize < FP32)

    def _recomputes_last(self, chunk: int) -> bool:
        """Whether the last layer of a chunk, where backward starts, is computed again as a whole.
        """
        how = self.recompute
        return how.granularity == "full" and (
            how.method == "uniform" or how.num_layers >= self.counts[chunk])

    def _beside(self, weight: int) -> int:
        """Of a weight of so many numbers, in its layer's backward."""
        if self.quantized:
            return whole_bytes(weight, self.itemsize)
        return weight * self.itemsize if self.trained else 0


def count_tokens(plan: Plan) -> int:
    """Of a microbatch on a rank."""
    return plan.config.batch.micro_batch_size * plan.row_length // plan.layout.cp


def most_patches(plan: Plan) -> int:
    """Of a row that is all images, up to max-patches-per-row."""
    vision = plan.spec.vision
    grid = vision.smallest_grid
    # Before and behind images of one size stands a token; few larger ones need few of those.
    tokens = vision.num_tokens(grid) + 2 * bool(vision.only_grid and plan.spec.tokens.spanned)
    patches = max(1, plan.row_length // tokens) * math.prod(grid)
    return min(patches, plan.config.data.max_patches_per_row or patches)


def microbatch_patches(plan: Plan) -> int:
    """Of a microbatch of such rows."""
    return plan.config.batch.micro_batch_size * most_patches(plan)


def count_patches(plan: Plan) -> int:
    """Of these, on a rank; images of many sizes are taken to be divided evenly."""
    one = math.prod(plan.spec.vision.only_grid or (1,))
    return -(-microbatch_patches(plan) // (plan.layout.media_ranks * one)) * one


def language_layers(plan: Plan, held: RankMemory) -> Layers:
    decoder, layout, tp = plan.spec.decoder, plan.layout, plan.layout.tp
    experts, itemsize = decoder.experts, ITEMSIZE[plan.config.model.dtype]
    trained = LANGUAGE not in plan.trainable.frozen
    parts = tp if layout.sequence_parallel else 1
    inner, of_experts = decoder.ffn_hidden_size, {}
    if experts is not None:
        # Routers are taken to send every expert as much, or what it takes; ranks that share one
        # have all its tokens.
        taken = experts.per_token * min(1, plan.config.experts.moe_expert_capacity_factor or 1)
        inner = round(taken * experts.ffn_hidden_size)
        of_experts = dict(
            dispatched=round(count_tokens(plan) // parts * taken) * layout.expert_tp
            * decoder.hidden_size * itemsize,
            experts=experts.count, own_experts=experts.count // layout.ep,
            per_token=experts.per_token, sharing=layout.expert_tp, stacked=_stacked(plan),
        )
    # Of segments of several lengths, q, k and v are kept as turned and in rectangles of like
    # length, and the output in these and in order. Keys and values of groups are repeated for every
    # head at once; otherwise they are parts of the projection, which is kept with them, unless
    # rows are laid end to end or context parallelism exchanges them, which copies, or norms of
    # queries and keys keep it in fp32.
    heads, groups = decoder.num_attention_heads, decoder.num_query_groups
    queries, keys = heads * decoder.head_dim // tp, -(-groups // tp) * decoder.head_dim
    gathered = (heads + 2 * groups) * decoder.head_dim
    grouped = max(1, groups // tp // layout.cp) < heads // tp // layout.cp
    kept = decoder.qk_norm and itemsize == FP32
    copied = layout.cp > 1 or plan.config.batch.micro_batch_size > 1
    return _layers(
        plan, held, LANGUAGE, plan.recompute, width=decoder.hidden_size,
        tokens=count_tokens(plan), parts=parts, head_dim=decoder.head_dim,
        queries=queries, keys=keys, others=(gathered - queries - 2 * keys) * (groups < tp),
        attended=5 if grouped else 6 if kept and layout.cp == 1 else 7 if copied else 9,
        keeps_projection=not grouped and not copied,
        qk_norms=decoder.qk_norm * (1 + trained),
        inner=inner // tp, activation="swiglu", passing=4, biased=False, norms=1 + trained,
        norm_copies=5,
        **of_experts,
    )


def _stacked(plan: Plan) -> int:
    """Of the gates and up projections of a layer's experts on a rank, if a GPU has them so."""
    way, decoder, layout = plan.experts_way(ExpertsCase), plan.spec.decoder, plan.layout
    if way is None or not way.grouped:
        return 0
    first = 2 * decoder.experts.ffn_hidden_size // layout.expert_tp * decoder.hidden_size
    return decoder.experts.count // layout.ep * first * ITEMSIZE[plan.config.model.dtype]


def vision_layers(plan: Plan, held: RankMemory) -> Layers | None:
    """None on a stage without vision layers."""
    vision, tp = plan.spec.vision, plan.layout.vit_tp
    if vision is None or not any(
        plan.split.layers(VISION, held.stage, chunk) for chunk in range(plan.layout.vp)
    ):
        return None
    trained, rms = VISION not in plan.trainable.frozen, vision.normalization == "RMSNorm"
    # Frames of one size are a rectangle as they are. Without rotary positions q, k and v are views
    # of the projection, and what attention gives is the next layer's input as it is.
    return _layers(
        plan, held, VISION, plan.vit_recompute, width=vision.hidden_size,
        tokens=count_patches(plan), parts=1, head_dim=vision.head_dim,
        queries=vision.hidden_size // tp, keys=vision.hidden_size // tp,
        attended=3 if vision.only_grid else 5,
        keeps_projection=False, qk_norms=0, inner=vision.ffn_hidden_size // tp,
        activation="swiglu" if vision.gated else vision.activation,
        passing=6 if vision.gated else 4,  # a bias makes another tensor
        biased=True, norms=1 + rms * trained, norm_copies=5 if rms else 2,
    )


def _layers(plan: Plan, held: RankMemory, part: str, recompute: Recompute, **sizes) -> Layers:
    counts = tuple(len(plan.split.layers(part, held.stage, chunk))
                   for chunk in range(plan.layout.vp))
    trainable = plan.trainable
    trained, adapted = part not in trainable.frozen, part in trainable.adapted
    # Gradients reach the language layers for whatever is trained before them.
    reached = trained or adapted or part == LANGUAGE
    itemsize = ITEMSIZE[plan.config.model.dtype]
    return Layers(
        counts=counts, recompute=recompute, trained=trained, adapted=adapted, reached=reached,
        mlp_adapted=adapted and any(".mlp." in name for _, name in _factor_pairs(held, part)),
        quantized=part == LANGUAGE and trainable.quantize_base is not None,
        adapter=_factors(plan, held, part, sizes) * itemsize // max(sum(counts), 1),
        itemsize=itemsize, **sizes,
    )


def _factors(plan: Plan, held: RankMemory, part: str, sizes: dict) -> int:
    """Numbers that the factors of a stage keep: A x, the B that is made of what is stored, and what
    dropout drew."""
    numbers, whole, cut = 0, sizes["tokens"], sizes["tokens"] // sizes["parts"]
    for (_, layer), pair in _factor_pairs(held, part).items():
        (rank, width), (rows, _) = pair["A"].shape, pair["B"].shape
        # Sequence parallelism gathers A x before a column-parallel layer's B, and scatters another.
        column = layer.endswith((".linear_qkv.", ".linear_fc1."))
        seen, given = (cut, whole) if column else (whole, cut)
        drawn = seen * width * (plan.config.lora.lora_dropout > 0)
        numbers += pair["A"].layers * (given * rank + rows * rank + drawn)
    return numbers


def _factor_pairs(held: RankMemory, part: str) -> dict[tuple[int, str], dict[str, Held]]:
    """By the chunk and the linear layer that they are of."""
    found = {}
    for number, chunk in enumerate(held.chunks):
        for one in (one for one in chunk.held if part_of(one.name) == part):
            for factor, leaf in FACTORS.items():
                if one.name.endswith(f".{leaf}"):
                    layer = one.name.removesuffix(leaf)
                    found.setdefault((number, layer), {})[factor] = one
    return found
