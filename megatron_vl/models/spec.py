"""What a model is made of, as numbers: no torch, no Megatron-Core.

A family's `config.py` reads these from the model's own config.json; the model builder, the
converter, the data pipeline and the trainer all read the same `ModelSpec`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_vl.errors import InputError
from megatron_vl.models.media import MEDIA_KINDS
from megatron_vl.parallel import LANGUAGE, VISION, Layout, StageSplit
from megatron_vl.parallel.stages import WORDS

if TYPE_CHECKING:
    import torch

FFN_MULTIPLE = 16  # of a tower's stored MLP; no published tower has more heads for TP to divide
DTYPES = ("float32", "bfloat16", "float16")


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

    def __post_init__(self) -> None:
        _positive(self, "count", "per_token", "ffn_hidden_size")
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
    experts: ExpertsSpec | None = None  # None: every layer has an MLP of `ffn_hidden_size`
    normalized_head: bool = False  # the output layer's rows are divided by their length (NormHead)

    def __post_init__(self) -> None:
        _positive(self, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
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


class TowerSpec(Protocol):
    """Sizes of a vision tower and of what projects it to the decoder's width, whatever they are.

    A dataclass, so that two models can be compared. A grid is the frames, rows and columns of
    patches of one image or video.
    """

    @property
    def depth(self) -> int:
        """Layers."""

    @property
    def hidden_size(self) -> int:
        """Width of a layer."""

    @property
    def head_dim(self) -> int:
        """Width of one head of a layer."""

    @property
    def activation(self) -> str:
        """Of the layers' MLP."""

    @property
    def gated(self) -> bool:
        """Whether that has a gate."""

    @property
    def out_hidden_size(self) -> int:
        """Width of the embeddings: the decoder's."""

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""

    @property
    def divided(self) -> dict[str, int]:
        """The sizes that tensor parallelism divides, by name."""

    @property
    def smallest_grid(self) -> tuple[int, int, int]:
        """Of the smallest image."""

    @property
    def only_grid(self) -> tuple[int, int, int] | None:
        """Of every image, where all are brought to one size; None: an image keeps its own."""

    def num_tokens(self, grid: Sequence[int]) -> int:
        """Tokens that the decoder sees of an image or video."""

    def states(self, grids: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Shape of the hidden states of these grids between layers: patches, width."""

    def forward_flops(self, grid: tuple[int, int, int]) -> int:
        """FLOPs of a forward pass over one image or video."""

    def merger_flops(self, grid: tuple[int, int, int]) -> int:
        """Of them, those of what projects it to the decoder's width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSpec:
    """The vision tower of Qwen2-VL and of those after it, with the merger behind it.

    Raises:
        InputError: sizes that do not fit one another.
    """

    depth: int  # layers
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    in_channels: int
    patch_size: int  # pixels a side
    temporal_patch_size: int  # frames a patch
    spatial_merge_size: int  # patches a side that the merger joins to one token
    norm_eps: float
    out_hidden_size: int  # the decoder's hidden size
    activation: str  # of the blocks' MLP: "quick_gelu", "gelu", "silu"
    gated: bool = False  # the MLP has a gate
    normalization: str = "LayerNorm"  # or "RMSNorm"
    window_cells: int | None = None  # merged patches a side of a window; None: there are none
    full_attention_layers: tuple[int, ...] = ()  # of a tower with windows, those without
    tokens_per_second: float | None = None  # positions a second of video takes; None: one a frame

    def __post_init__(self) -> None:
        _positive(self, "depth", "hidden_size", "num_heads", "ffn_hidden_size", "in_channels",
                  "patch_size", "temporal_patch_size", "spatial_merge_size", "out_hidden_size")
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"config.json's vision width {self.hidden_size} is not a multiple of its "
                f"{self.num_heads} heads."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def stored_ffn_size(self) -> int:
        """Width of the MLP in the model that trains: a gated one is filled up with zeros, so that
        TP can divide it (Qwen2.5-VL's 3420 is 4 x 855)."""
        return -(-self.ffn_hidden_size // FFN_MULTIPLE) * FFN_MULTIPLE if self.gated else (
            self.ffn_hidden_size
        )

    @property
    def merged_size(self) -> int:
        """Width of the patches that become one token, side by side."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch, as the image processor hands it over."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    # ---- what pipeline and fusion ask, whatever the tower is ----------------------------------

    @property
    def divided(self) -> dict[str, int]:
        """See `TowerSpec`."""
        return {"vision attention heads": self.num_heads, "vision ffn width": self.stored_ffn_size,
                "merger width": self.merged_size}

    @property
    def smallest_grid(self) -> tuple[int, int, int]:
        """Of an image of one token."""
        return 1, self.spatial_merge_size, self.spatial_merge_size

    @property
    def only_grid(self) -> None:
        """See `TowerSpec`."""
        return None

    def num_tokens(self, grid: Sequence[int]) -> int:
        """Tokens that the decoder sees of an image or video of t x h x w patches."""
        return math.prod(grid) // self.spatial_merge_size**2

    def states(self, grids: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Shape of the hidden states of these grids between layers: patches, width."""
        return sum(map(math.prod, grids)), self.hidden_size

    def forward_flops(self, grid: tuple[int, int, int]) -> int:
        """FLOPs of a forward pass over one image or video of t x h x w patches.

        Two for each multiply-add of the matrix products: a patch embedding, in every layer q, k, v
        and the projection (4 D^2), the MLP (2 D F, with a gate 3 D F) and, within a frame of
        L = h w patches or within windows, scores
        and sums (2 L D), and the merger; as Megatron-LM counts (arXiv 2104.04473, appendix), with D
        the width and F the MLP's.
        """
        width, patches = self.hidden_size, math.prod(grid)
        layer = 4 * width**2 + (3 if self.gated else 2) * width * self.ffn_hidden_size
        matrices = 2 * patches * (self.patch_dim * width + self.depth * layer)
        return matrices + self.attention_flops(grid) + self.merger_flops(grid)

    def attention_flops(self, grid: tuple[int, int, int]) -> int:
        """Of them, scores and sums."""
        t, h, w = grid
        pairs = self.depth * t * (h * w) ** 2
        if self.window_cells is not None:
            full = len(self.full_attention_layers)
            side = self.window_cells * self.spatial_merge_size  # patches

            def squares(size: int) -> int:
                """Of the windows' extents along one side, the sum."""
                return size // side * side**2 + (size % side) ** 2

            pairs = t * (full * (h * w) ** 2 + (self.depth - full) * squares(h) * squares(w))
        return 2 * pairs * 2 * self.hidden_size

    def merger_flops(self, grid: tuple[int, int, int]) -> int:
        """Of them, the merger's."""
        merged = self.merged_size
        merger = (merged**2 + merged * self.out_hidden_size) // self.spatial_merge_size**2
        return 2 * math.prod(grid) * merger


@dataclass(frozen=True, kw_only=True, slots=True)
class Grounding:
    """How a family writes what an object is called and where it is: marks around it, and points
    `(x,y)` in `scale` parts of the image's width and height."""

    ref: tuple[str, str]
    box: tuple[str, str]  # around one point or two corners
    quad: tuple[str, str]  # around four corners
    scale: int


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonGrounding:
    """How a family writes objects as JSON: `{"BOX": [x1, y1, x2, y2], "LABEL": "the cat"}`, in
    pixels of the resized image; for four corners it has no form."""

    point: str  # the key of one point
    box: str  # of two corners
    label: str  # of what the object is called


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenIds:
    """Ids config.json gives; None where only the tokenizer knows."""

    image: int | None = None  # None: the model takes none
    video: int | None = None
    vision_start: int | None = None
    vision_end: int | None = None
    spanned: bool = False  # all between these two stands for an image, whatever its ids are
    grounding: Grounding | JsonGrounding | None = None  # None: the family has no form for objects
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """What the model takes beside text."""
        return tuple(kind for kind in MEDIA_KINDS if getattr(self, kind) is not None)

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens, int64 [.., S], stand for images and videos: bool [.., S]."""
        if self.spanned:
            starts, ends = ids == self.vision_start, ids == self.vision_end
            return (starts.cumsum(-1) > ends.cumsum(-1)) & ~starts
        places = ids != ids
        for token in (self.image, self.video):
            if token is not None:
                places = places | (ids == token)
        return places


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """One model: a language model, and the vision tower before it where it has one."""

    model_type: str  # config.json's, and the registry's name of the family
    dtype: str  # of the published weights: one of DTYPES
    decoder: DecoderSpec
    tokens: TokenIds
    vision: TowerSpec | None = None  # None: the model takes text alone

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(
                f"config.json's dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}."
            )
        if self.vision is not None and self.vision.out_hidden_size != self.decoder.hidden_size:
            raise InputError(
                f"config.json's vision tower ends {self.vision.out_hidden_size} wide but the "
                f"language model is {self.decoder.hidden_size} wide; make them equal."
            )

    def takes_text_alone(self, option: str, value: object) -> InputError:
        """That an option is about vision, which this model has none of."""
        said = str(value).lower() if isinstance(value, bool) else value
        return InputError(
            f"{option.replace('_', '-')} is {said}, but {self.model_type} takes text alone; leave "
            f"it out."
        )

    @property
    def towers(self) -> list[TowerSpec | DecoderSpec]:
        """Their sizes, in the order they run."""
        return [self.decoder] if self.vision is None else [self.vision, self.decoder]

    @property
    def layers(self) -> dict[str, int]:
        """Of every tower of `StageSplit`, in the order they run."""
        return ({} if self.vision is None else {VISION: self.vision.depth}) | {
            LANGUAGE: self.decoder.num_layers
        }

    def check_layout(self, layout: Layout, split: StageSplit) -> None:
        """Whether this model can be spread over `layout` with the layers of `split`.

        Raises:
            InputError: tensor parallelism that does not divide a dimension, or a split for another
                model or layout.
        """
        tp, decoder, vision = layout.tp, self.decoder, self.vision
        groups, experts = decoder.num_query_groups, decoder.experts
        for what, size in (
            ("attention heads", decoder.num_attention_heads),
            ("ffn width", (experts or decoder).ffn_hidden_size),
            ("hidden width", decoder.hidden_size),
        ):
            if size % tp:
                raise InputError(
                    f"TP {tp} does not divide the model's {size} {what}; use a TP that does."
                )
        if vision is None and layout.vit_data_parallel:
            raise self.takes_text_alone("vit_data_parallel", True)
        for what, size in () if vision is None else vision.divided.items():
            if size % layout.vit_tp:
                raise InputError(
                    f"TP {tp} does not divide the model's {size} {what}; use a TP that does."
                )
        heads, cp = decoder.num_attention_heads // tp, layout.cp
        if heads % cp:
            raise InputError(
                f"CP {cp} does not divide the {heads} attention heads that TP {tp} leaves to a "
                f"rank; use a CP that does, or a smaller TP."
            )
        here = max(1, groups // tp)
        if here % cp and cp % here:
            raise InputError(
                f"CP {cp} and the {here} key/value heads that TP {tp} leaves to a rank do not "
                f"divide one another; use a CP that does."
            )
        # Megatron-Core cuts the fused [q.. k v] rows evenly whatever TP is, and gathers them when
        # a key/value head would be cut; for that, either number must be a multiple of the other.
        if groups % tp and tp % groups:
            raise InputError(
                f"TP {tp} and the model's {groups} key/value heads do not divide one another; use "
                f"a divisor or a multiple of {groups}."
            )
        if (split.pp, split.vp) != (layout.pp, layout.vp):
            raise InputError(
                f"the layer split ({split}) is for PP {split.pp} x VP {split.vp} but the layout is "
                f"PP {layout.pp} x VP {layout.vp}; give one split for the layout."
            )
        for tower in dict.fromkeys((LANGUAGE, *self.layers, *split.towers)):
            have, want = split.count(tower), self.layers.get(tower, 0)
            if have != want:
                raise InputError(
                    f"the layer split ({split}) holds {have} {WORDS.get(tower, tower)} layers but "
                    f"config.json has {want}."
                )

    def check_run(self, layout: Layout, split: StageSplit) -> None:
        """Whether this model can also be run in `layout`, and not only be stored for it.

        Raises:
            InputError: as `check_layout`, or experts whose tokens tensor parallelism would repeat.
        """
        self.check_layout(layout, split)
        if self.decoder.experts is not None and layout.tp > 1 and not layout.sequence_parallel:
            raise InputError(
                f"TP {layout.tp} would send every token to the experts of {self.model_type} "
                f"{layout.tp} times; add --sequence-parallel."
            )

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding under tensor parallelism: the next multiple of `tp`."""
        return -(-self.decoder.vocab_size // tp) * tp

    def split(self, **wanted) -> StageSplit:
        """`StageSplit.create` with this model's layer counts."""
        return StageSplit.create(layers=self.layers, **wanted)

    def megatron_args(self, layout: Layout, split: StageSplit, dtype: str) -> dict:
        """The `args` of a checkpoint under Megatron's names, plain values only.

        The entry `megatron_vl` holds what Megatron has no name for.
        """
        decoder, vision = self.decoder, self.vision
        stages = [sum(row[stage] for row in split.llm) for stage in range(split.pp)]
        return {
            "num_layers": decoder.num_layers,
            "hidden_size": decoder.hidden_size,
            "ffn_hidden_size": decoder.ffn_hidden_size,
            "num_attention_heads": decoder.num_attention_heads,
            "group_query_attention": decoder.num_query_groups != decoder.num_attention_heads,
            "num_query_groups": decoder.num_query_groups,
            "kv_channels": decoder.head_dim,
            "vocab_size": decoder.vocab_size,
            "padded_vocab_size": self.padded_vocab_size(layout.tp),
            "untie_embeddings_and_output_weights": not decoder.tie_word_embeddings,
            "max_position_embeddings": decoder.max_position_embeddings,
            **_position_args(decoder),
            "rotary_base": decoder.rope_theta,
            "normalization": "RMSNorm",
            "norm_epsilon": decoder.norm_eps,
            "swiglu": True,
            "add_bias_linear": False,
            "add_qkv_bias": decoder.qkv_bias,
            "qk_layernorm": decoder.qk_norm,
            **_expert_args(decoder.experts),
            "init_method_std": decoder.init_std,
            **({} if vision is None else {
                "vision_num_layers": vision.depth, "vision_hidden_size": vision.hidden_size,
            }),
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
            "params_dtype": dtype,
            "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": layout.pp,
            "virtual_pipeline_model_parallel_size": layout.vp if layout.vp > 1 else None,
            "decoder_first_pipeline_num_layers": None if len(set(stages)) == 1 else stages[0],
            "megatron_vl": {
                "model_type": self.model_type,
                "layout": {"tp": layout.tp, "pp": layout.pp, "vp": layout.vp},
                "split": split.to_dict(),
                "dtype": dtype,
            },
        }


def _position_args(decoder: DecoderSpec) -> dict:
    if len(decoder.rope_sections) == 1:
        return {"position_embedding_type": "rope"}
    return {"position_embedding_type": "mrope", "mrope_section": list(decoder.rope_sections)}


def _expert_args(experts: ExpertsSpec | None) -> dict:
    if experts is None:
        return {}
    return {
        "num_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.renormalized,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": 1,
    }


def _positive(spec, *names: str) -> None:
    for name in names:
        size = getattr(spec, name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(
                f"config.json's {name} is {size!r}; it must be a whole number above 0."
            )
