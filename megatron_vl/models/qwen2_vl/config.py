"""Qwen2-VL's config.json, in the flat form it was published in and in transformers 5's nested one.

Flat: the decoder's keys lie at the top, rope under `rope_theta` and `rope_scaling`. Nested: they
lie under `text_config`, rope under `rope_parameters`. Every number the model needs comes from here.
"""

from __future__ import annotations

from megatron_vl.errors import InputError
from megatron_vl.models.spec import DecoderSpec, Grounding, TokenIds, VisionSpec, VLMSpec

SIZES = {  # published sizes: (language layers, hidden size), to check a name against config.json
    "2B": (28, 1536),
    "7B": (28, 3584),
    "72B": (80, 8192),
}

# arXiv 2409.12191, section 2.2.1: coordinates within [0, 1000).
GROUNDING = Grounding(
    ref=("<|object_ref_start|>", "<|object_ref_end|>"), box=("<|box_start|>", "<|box_end|>"),
    quad=("<|quad_start|>", "<|quad_end|>"), scale=1000,
)

_MISSING = object()


class _Keys:
    """Looks a key up in several sections of config.json, the first that has it wins."""

    def __init__(self, name: str, *sections: dict) -> None:
        self.name, self.sections = name, [s for s in sections if isinstance(s, dict)]

    def get(self, *names: str, default=_MISSING, kind: type | tuple = (int, float, str, list)):
        for section in self.sections:
            for name in names:
                if section.get(name) is not None:
                    value = section[name]
                    if not isinstance(value, kind):
                        raise InputError(f"{name} is {value!r}; copy the model's own config.json.")
                    return value
        if default is _MISSING:
            raise InputError(
                f"{names[0]} is missing{self.name}; copy the model's own config.json."
            )
        return default

    def size(self, *names: str, default=_MISSING) -> int:
        return self.get(*names, default=default, kind=int)

    def number(self, *names: str, default=_MISSING) -> float:
        value = self.get(*names, default=default, kind=(int, float, str))
        try:
            return float(value)
        except ValueError as error:
            raise InputError(f"{names[0]} is {value!r}; it must be a number.") from error


def read_config(config: dict) -> VLMSpec:
    """The spec of a parsed config.json of Qwen2-VL.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    text = _Keys("", config.get("text_config"), config)
    decoder = _decoder(text, config)
    if not isinstance(config.get("vision_config"), dict):
        raise InputError("vision_config is missing; copy the model's own config.json.")
    return VLMSpec(
        model_type=config["model_type"],
        dtype=_dtype(config),
        decoder=decoder,
        vision=_vision(_Keys(" from vision_config", config["vision_config"]), decoder.hidden_size),
        tokens=_tokens(_Keys("", config, config.get("text_config"))),
    )


def _decoder(text: _Keys, config: dict) -> DecoderSpec:
    rope = _Keys(
        " (rope_scaling or rope_parameters)",
        *(section.get(name) for section in text.sections
          for name in ("rope_parameters", "rope_scaling")),
        *text.sections,
    )
    for name in ("rope_type", "type"):
        kind = rope.get(name, default="default", kind=str)
        if kind not in ("default", "mrope"):
            raise InputError(
                f"{name} of rope_scaling (or rope_parameters) is {kind!r}, which is not supported; "
                f"train with the published 'mrope' and set it for inference."
            )
    section = rope.get("mrope_section", kind=list)
    if len(section) != 3 or not all(isinstance(n, int) for n in section):
        raise InputError(f"mrope_section is {section}; it must be three whole numbers.")
    if text.get("use_sliding_window", default=False, kind=bool):
        raise InputError(
            "use_sliding_window is true, which is not supported; set it to false if the model "
            "was published so."
        )
    activation = text.get("hidden_act", default="silu", kind=str)
    if activation != "silu":
        raise InputError(f"hidden_act is {activation!r}; Qwen2-VL's decoder has silu.")
    hidden, heads = text.size("hidden_size"), text.size("num_attention_heads")
    if hidden % heads:
        raise InputError(f"hidden_size {hidden} is not a multiple of its {heads} heads.")
    # Older files of the nested form keep the tie under text_config; either place ties.
    tied = any(s.get("tie_word_embeddings") is True for s in (config, *text.sections))
    return DecoderSpec(
        num_layers=text.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=text.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=text.size("num_key_value_heads", default=heads),
        head_dim=hidden // heads,
        vocab_size=text.size("vocab_size"),
        tie_word_embeddings=tied,
        norm_eps=text.number("rms_norm_eps"),
        rope_theta=rope.number("rope_theta"),
        mrope_section=tuple(section),
        qkv_bias=True,
        max_position_embeddings=text.size("max_position_embeddings"),
        init_std=text.number("initializer_range", default=0.02),
    )


def _vision(keys: _Keys, decoder_hidden: int) -> VisionSpec:
    width = keys.size("embed_dim")
    return VisionSpec(
        depth=keys.size("depth"),
        hidden_size=width,
        num_heads=keys.size("num_heads"),
        ffn_hidden_size=int(width * keys.number("mlp_ratio", default=4)),
        in_channels=keys.size("in_channels", "in_chans", default=3),
        patch_size=keys.size("patch_size"),
        temporal_patch_size=keys.size("temporal_patch_size", default=2),
        spatial_merge_size=keys.size("spatial_merge_size", default=2),
        norm_eps=1e-6,  # fixed in the published model; config.json has no key for it
        out_hidden_size=keys.size("hidden_size", default=decoder_hidden),
        activation=keys.get("hidden_act", default="quick_gelu", kind=str),
    )


def _tokens(keys: _Keys) -> TokenIds:
    eos = keys.get("eos_token_id", default=None, kind=(int, list))
    return TokenIds(
        image=keys.size("image_token_id"),
        video=keys.size("video_token_id"),
        vision_start=keys.size("vision_start_token_id"),
        vision_end=keys.size("vision_end_token_id"),
        bos=keys.size("bos_token_id", default=None),
        eos=eos[0] if isinstance(eos, list) else eos,
        pad=keys.size("pad_token_id", default=None),
        grounding=GROUNDING,
    )


def _dtype(config: dict) -> str:
    name = config.get("torch_dtype") or config.get("dtype")
    if name is None and isinstance(config.get("text_config"), dict):
        name = config["text_config"].get("dtype") or config["text_config"].get("torch_dtype")
    return str(name or "bfloat16").removeprefix("torch.")
