"""What a model is made of, as numbers: no torch, no Megatron-Core.

A family's `config.py` reads these from the model's own config.json; the model builder, the
converter, the data pipeline and the trainer all read the same `ModelSpec`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_vl.errors import InputError
from megatron_vl.models.decoder_spec import DecoderSpec, ExpertsSpec
from megatron_vl.models.media import MEDIA_KINDS
from megatron_vl.models.tower_spec import TowerSpec
from megatron_vl.parallel import LANGUAGE, VISION, Layout, StageSplit
from megatron_vl.parallel.stages import WORDS

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


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
    """How a family writes objects as JSON: `{"BOX": [x1, y1, x2, y2], "LABEL": "the cat"}`; for
    four corners it has no form."""

    point: str  # the key of one point
    box: str  # of two corners
    label: str  # of what the object is called
    scale: int | None = None  # parts of the image's sides; None: pixels of the resized image


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenIds:
    """Ids config.json gives; None where only the tokenizer knows."""

    image: int | None = None  # None: the model takes none
    video: int | None = None
    vision_start: int | None = None
    vision_end: int | None = None
    spanned: bool = False  # all between these two stands for an image, whatever its ids are
    # What is written before every frame of a video, each of which then is between these two, of
    # the second at which it is shown; None: a video is one place.
    timestamp: str | None = None
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
        features = 0 if self.vision is None else self.vision.num_features
        if features > self.decoder.num_layers:
            raise InputError(
                f"config.json's vision tower hands features to {features} language layers, but "
                f"there are {self.decoder.num_layers}."
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
            *([("ffn width", decoder.ffn_hidden_size)] if experts is None else []),
            ("hidden width", decoder.hidden_size),
        ):
            if size % tp:
                raise InputError(
                    f"TP {tp} does not divide the model's {size} {what}; use a TP that does."
                )
        self._check_experts(layout)
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
            InputError: as `check_layout`, ranks that expert parallelism does not divide, or experts
                whose tokens tensor parallelism would repeat.
        """
        self.check_layout(layout, split)
        ranks, wanted = layout.world_size // layout.pp, layout.expert_tp * layout.ep
        if ranks % wanted:
            less = "EP, or the ETP" if layout.expert_tp > 1 else "EP"
            raise InputError(
                f"EP {layout.ep} needs a multiple of {wanted} ranks a stage, EP x ETP "
                f"{layout.expert_tp}, but TP {layout.tp} x CP {layout.cp} x DP {layout.dp} are "
                f"{ranks}; start more processes, or lower the {less}."
            )
        if self.decoder.experts is not None and layout.tp > 1 and not layout.sequence_parallel:
            raise InputError(
                f"TP {layout.tp} would send every token to the experts of {self.model_type} "
                f"{layout.tp} times; add --sequence-parallel."
            )

    def _check_experts(self, layout: Layout) -> None:
        experts = self.decoder.experts
        if experts is None:
            if layout.ep > 1:
                raise InputError(
                    f"EP {layout.ep} is for models with experts, and {self.model_type} has none; "
                    f"leave it out."
                )
            return
        name = "ETP" if layout.etp else "TP"
        for by, parts, what, size in (
            ("EP", layout.ep, "experts of a layer", experts.count),
            (name, layout.expert_tp, "ffn width of an expert", experts.ffn_hidden_size),
        ):
            if size % parts:
                raise InputError(
                    f"{by} {parts} does not divide the model's {size} {what}; use one that does."
                )

    def travelling_features(self, split: StageSplit) -> int:
        """Features of the tower that chunks hand on, for language layers of later ones."""
        if self.vision is None or split.pp == 1:
            return 0
        first = split.layers(LANGUAGE, *split.embedding_chunk)
        return max(0, self.vision.num_features - len(first))

    def travelling_states(self, split: StageSplit, row_length: int) -> int:
        """Numbers that chunks hand on for a row while the tower spans several, language layers too:
        of a row that is all images, as it enters the tower's last chunk. 0 where none does."""
        if not split.encoders_span:
            return 0
        grid = self.vision.smallest_grid
        images = -(-row_length // self.vision.num_tokens(grid))
        first = split.layers(VISION, *split.embedding_chunk).start
        return images * math.prod(self.vision.states([grid], first))

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
            **_expert_args(decoder.experts, layout),
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
                "layout": layout.cut,
                "split": split.to_dict(),
                "dtype": dtype,
            },
        }


def _position_args(decoder: DecoderSpec) -> dict:
    if len(decoder.rope_sections) == 1:
        return {"position_embedding_type": "rope"}
    return {"position_embedding_type": "mrope", "mrope_section": list(decoder.rope_sections),
            **({"mrope_interleaved": True} if decoder.rope_interleaved else {})}


def _expert_args(experts: ExpertsSpec | None, layout: Layout) -> dict:
    if experts is None:
        return {}
    return {
        "num_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.renormalized,
        "moe_router_load_balancing_type": "aux_loss" if experts.adds_aux_loss else "none",
        "moe_aux_loss_coeff": experts.aux_loss_coeff if experts.adds_aux_loss else 0.0,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }
