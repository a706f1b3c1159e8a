"""Sizes of a language model: no torch, no Megatron-Core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.errors import InputError
from megatron_vl.models.sizes import check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsSpec:
    """The experts that every layer has in the place of its MLP, and how a token finds its own.

    Raises:
        InputError: sizes that do not fit one another.
    """

    count: int  # of a layer
    per_token: int  # experts that a token goes to
    ffn_hidden_size: int  # width of an expert's gate, and of its up projection
    renormalized: bool  # the weights of a token's experts are made to sum to one
    adds_aux_loss: bool = False  # config.json has training add a loss that balances the experts
    aux_loss_coeff: float = 0.001  # config.json's for such a loss

    def __post_init__(self) -> None:
        check_positive(self, "count", "per_token", "ffn_hidden_size")
        if self.per_token > self.count:
            raise InputError(
                f"config.json sends a token to {self.per_token} experts but has {self.count}; "
                f"num_experts_per_tok must not be more than num_experts."
            )
        if self.renormalized and self.per_token == 1:
            raise InputError(
                "config.json sends a token to one expert (num_experts_per_tok 1) with weight one "
                "(norm_topk_prob true), so that nothing trains the router; set one of them "
                "otherwise."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """The language model.

    Raises:
        InputError: sizes that do not fit one another.
    """

    num_layers: int
    hidden_size: int  # width of the residual stream
    ffn_hidden_size: int  # width of the gate, and of the up projection
    num_attention_heads: int  # query heads
    num_query_groups: int  # key/value heads
    head_dim: int  # width of one head
    vocab_size: int  # rows of the embedding as published, before any padding for TP
    tie_word_embeddings: bool  # the output layer is the embedding
    norm_eps: float
    rope_theta: float  # base of the rotary frequencies
    rope_sections: tuple[int, ...]  # half-head channels that each axis of positions turns
    qkv_bias: bool
    max_position_embeddings: int  # tokens
    init_std: float  # standard deviation of freshly drawn weights
    qk_norm: bool = False  # queries and keys are normalised, head by head
    rope_interleaved: bool = False  # the axes take turns at the channels, not a run of them each
    experts: ExpertsSpec | None = None  # None: every layer has an MLP of `ffn_hidden_size`
    normalized_head: bool = False  # the output layer's rows are divided by their length (NormHead)

    def __post_init__(self) -> None:
        check_positive(self, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
                  "num_query_groups", "head_dim", "vocab_size")
        if self.num_attention_heads % self.num_query_groups:
            raise InputError(
                f"config.json has {self.num_attention_heads} attention heads and "
                f"{self.num_query_groups} key/value heads; the first must be a multiple of the "
                f"second."
            )
        if 2 * sum(self.rope_sections) != self.head_dim:
            raise InputError(
                f"config.json's mrope_section {list(self.rope_sections)} sums to "
                f"{sum(self.rope_sections)}; it must be half of the head width {self.head_dim}."
            )
        axes = len(self.rope_sections)
        if self.rope_interleaved and axes * max(self.rope_sections[1:]) > sum(self.rope_sections):
            raise InputError(
                f"config.json's mrope_section {list(self.rope_sections)} leaves too few of the "
                f"{sum(self.rope_sections)} channels for axes that take turns; copy the model's "
                f"own config.json."
            )

    def forward_flops(self, lengths: Sequence[int], trained: int) -> int:
        """FLOPs of a forward pass over samples of `lengths` tokens, `trained` of which are trained.

        Two for each multiply-add of the matrix products: in every layer q and the projection
        (2 D H), k and v (2 D G), the three of the MLP (3 D F), attention, and at trained tokens,
        where alone they are computed, the logits (D V); as Megatron-LM counts (arXiv 2104.04473,
        appendix), with D, F and V the widths of the residual stream, the MLP and the vocabulary,
        and H and G those of the query and key/value heads together. Of E experts a token passes
        the router (D E) and the MLPs of those it goes to.
        """
        heads, groups = (n * self.head_dim for n in (self.num_attention_heads,
                                                     self.num_query_groups))
        mlp = 3 * self.ffn_hidden_size
        if self.experts is not None:
            mlp = self.experts.count + 3 * self.experts.per_token * self.experts.ffn_hidden_size
        layer = self.hidden_size * (2 * heads + 2 * groups + mlp)
        matrices = sum(lengths) * self.num_layers * layer
        logits = trained * self.hidden_size * self.vocab_size
        return 2 * (matrices + logits) + self.attention_flops(lengths)

    def attention_flops(self, lengths: Sequence[int]) -> int:
        """Of them, scores and sums: of a token with itself and those before it in its sample."""
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return 2 * pairs * 2 * self.num_layers * self.num_attention_heads * self.head_dim
