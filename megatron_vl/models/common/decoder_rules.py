"""The weights a Qwen2 or Qwen3 decoder has under Hugging Face's names and under Megatron-Core's.

H hidden, F ffn width, V vocabulary, N query heads, G key/value heads, D head width. Families that
share the decoder share these lines.
"""

from __future__ import annotations

from megatron_vl.models.decoder_spec import DecoderSpec
from megatron_vl.models.spec import ModelSpec
from megatron_vl.weights.map import (
    EMBEDDING,
    LAST,
    LAST_COPY,
    Place,
    Weight,
    WeightMap,
    Where,
)
from megatron_vl.weights.rules import QKV, Copy, FusedQKV, GateUp, RowParallel, Vocab
from megatron_vl.weights.stacks import Stack

MCORE = "language_model"


def whole_map(
    spec: ModelSpec, source: str, weights: list[Weight], *,
    embedding: str = "model.embed_tokens.weight", head: str = "lm_head.weight",
    renamed: tuple[tuple[str, str], ...] = (), stacks: tuple[Stack, ...] = (),
    stacked: bool = False,
) -> WeightMap:
    """The map of a family whose `weights` are all of the model.

    Args:
        source: the family's file, for messages.
        embedding, head: published names; of a tied model some files hold both.
        renamed, stacks, stacked: see `WeightMap`.
    """
    return WeightMap(
        source=source, layers=spec.layers, weights=tuple(weights), renamed=renamed, stacks=stacks,
        stacked=stacked,
        hf_copies=((head, embedding),) if spec.decoder.tie_word_embeddings else (),
        directions=(head,) if spec.decoder.normalized_head else (),
        hf_ignored=(r".*rotary_emb\.inv_freq",),
        mcore_ignored=(r".*\._extra_state\d*", r".*rotary_pos_emb\.inv_freq"),
    )


def decoder_weights(
    decoder: DecoderSpec, *, hf: str, head: str, packed: str | None = None
) -> list[Weight]:
    """Every weight of the language model.

    Args:
        hf: prefix of the decoder's published names, as in `{hf}.layers.0...`.
        head: published name of the output layer's weight.
        packed: published name of a projection that is q, k and v one after the other; None: each
            is published by itself.
    """
    H, V = decoder.hidden_size, decoder.vocab_size
    N, G, D = decoder.num_attention_heads, decoder.num_query_groups, decoder.head_dim
    source, layer = f"{hf}.layers.{{i}}", f"{MCORE}.decoder.layers.{{i}}"
    attention = f"{layer}.self_attention"

    def qkv(leaf: str, columns: int | None) -> QKV | FusedQKV:
        if packed is not None:
            return FusedQKV(key=f"{source}.self_attn.{packed}.{leaf}", heads=N, head_dim=D,
                            columns=columns)
        q, k, v = (f"{source}.self_attn.{one}_proj.{leaf}" for one in "qkv")
        return QKV(q=q, k=k, v=v, heads=N, groups=G, head_dim=D, columns=columns)

    def at_layer(name: str, rule) -> Weight:
        return Weight(place=Place(Where.LAYER), name=name, rule=rule)

    weights = [
        Weight(place=EMBEDDING, name=f"{MCORE}.embedding.word_embeddings.weight",
               rule=Vocab(key=f"{hf}.embed_tokens.weight", vocab=V, columns=H)),
        at_layer(f"{attention}.linear_qkv.layer_norm_weight",
                 Copy(key=f"{source}.input_layernorm.weight", shape=(H,))),
        at_layer(f"{attention}.linear_qkv.weight", qkv("weight", H)),
    ]
    if decoder.qkv_bias:
        weights.append(at_layer(f"{attention}.linear_qkv.bias", qkv("bias", None)))
    if decoder.qk_norm:
        weights += [at_layer(f"{attention}.{one}_layernorm.weight",
                             Copy(key=f"{source}.self_attn.{one}_norm.weight", shape=(D,)))
                    for one in "qk"]
    weights += [
        at_layer(f"{attention}.linear_proj.weight",
                 RowParallel(key=f"{source}.self_attn.o_proj.weight", shape=(H, N * D))),
        *(_mlp(decoder, source, layer) if decoder.experts is None
          else _experts(decoder, source, layer)),
        Weight(place=LAST, name=f"{MCORE}.decoder.final_layernorm.weight",
               rule=Copy(key=f"{hf}.norm.weight", shape=(H,))),
    ]
    output = f"{MCORE}.output_layer.weight"
    if decoder.tie_word_embeddings:
        # The stage that computes logits keeps its own copy unless it holds the embedding itself.
        weights.append(Weight(
            place=LAST_COPY, name=output,
            rule=Vocab(key=f"{hf}.embed_tokens.weight", vocab=V, columns=H),
        ))
    else:
        weights.append(Weight(
            place=LAST, name=output, rule=Vocab(key=head, vocab=V, columns=H),
        ))
    return weights


def expert_stacks(decoder: DecoderSpec, *, hf: str) -> tuple[Stack, ...]:
    """The tensors that hold a layer's experts where files have them as one.

    Args:
        hf: see `decoder_weights`.
    """
    source, experts = f"{hf}.layers.{{i}}.mlp.experts", decoder.experts
    H, F = decoder.hidden_size, experts.ffn_hidden_size
    gate, up, down = (f"{source}.{{e}}.{one}_proj.weight" for one in ("gate", "up", "down"))
    return (
        Stack(name=f"{source}.gate_up_proj", keys=(gate, up), shape=(2 * F, H),
              experts=experts.count),
        Stack(name=f"{source}.down_proj", keys=(down,), shape=(H, F), experts=experts.count),
    )


def _mlp(decoder: DecoderSpec, source: str, layer: str) -> list[Weight]:
    """The MLP of a layer and the norm before it, by the prefixes of both names."""
    norm = Weight(
        place=Place(Where.LAYER), name=f"{layer}.mlp.linear_fc1.layer_norm_weight",
        rule=Copy(key=f"{source}.post_attention_layernorm.weight", shape=(decoder.hidden_size,)),
    )
    return [norm, *_gated(f"{source}.mlp", f"{layer}.mlp", decoder.hidden_size,
                          decoder.ffn_hidden_size)]


def _experts(decoder: DecoderSpec, source: str, layer: str) -> list[Weight]:
    """The experts of a layer, their router, and the norm before it."""
    experts, H = decoder.experts, decoder.hidden_size
    router = Copy(key=f"{source}.mlp.gate.weight", shape=(experts.count, H))
    return [
        Weight(place=Place(Where.LAYER), name=f"{layer}.pre_mlp_layernorm.weight",
               rule=Copy(key=f"{source}.post_attention_layernorm.weight", shape=(H,))),
        Weight(place=Place(Where.LAYER), name=f"{layer}.mlp.router.weight", rule=router),
        *_gated(f"{source}.mlp.experts.{{e}}", f"{layer}.mlp.experts.local_experts.{{e}}", H,
                experts.ffn_hidden_size, experts=experts.count),
    ]


def _gated(
    source: str, mlp: str, hidden: int, ffn: int, *, experts: int | None = None
) -> list[Weight]:
    """A gate, an up and a down projection, of `experts` each."""
    first = GateUp(gate=f"{source}.gate_proj.weight", up=f"{source}.up_proj.weight",
                   ffn=ffn, columns=hidden)
    second = RowParallel(key=f"{source}.down_proj.weight", shape=(hidden, ffn))
    return [Weight(place=Place(Where.LAYER), name=f"{mlp}.{name}.weight", rule=rule,
                   experts=experts)
            for name, rule in (("linear_fc1", first), ("linear_fc2", second))]
