"""Steps that others published of Megatron-Core on GPUs: model, layout, batch, seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from true_sizes import published

from megatron_vl.planner.cards import Card, read_card
from megatron_vl.planner.microbatch import Microbatch
from megatron_vl.planner.rates import LinkRates, Rates
from megatron_vl.planner.search import Question
from megatron_vl.planner.step_time import StepTime, predict

GPT_VOCABULARY, GPT_LENGTH = 131072, 4096  # of the models of Megatron-LM's README
TEXT = {  # layers, hidden, heads, key/value heads, ffn, vocabulary
    "qwen2-7b": (28, 3584, 28, 4, 18944, 152064), "qwen2-14b": (48, 5120, 40, 8, 13824, 152064),
}
EXPERTS = {"qwen3-30b-a3b": (48, 2048, 32, 4, 768, 151936),
           "qwen3-235b-a22b": (94, 4096, 64, 4, 1536, 151936)}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One figure; what its source leaves open is the options' to assume."""

    model: str
    gpu: str
    gpus: int
    seconds: float
    options: dict = field(default_factory=dict)
    overlapped: bool = False  # TP's communication is, which is then predicted to take no time
    deepep: bool = False  # sends a token to a node once, whichever of its experts the token has
    image_tokens: int = 0  # of the images that fill half of a row; 0: text alone


def sized(layers: int, hidden: int, heads: int, groups: int, ffn: int, vocabulary: int) -> dict:
    """A config.json of Qwen2."""
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": hidden,
        "intermediate_size": ffn, "max_position_embeddings": 32768, "max_window_layers": layers,
        "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": groups,
        "initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_cache": True,
        "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": vocabulary,
    }


def config(model: str) -> dict:
    if model.startswith("gpt"):  # gpt LAYERS HIDDEN HEADS: an ungated MLP of 4 widths, as gated
        layers, hidden, heads = map(int, model.split()[1:])
        return sized(layers, hidden, heads, heads, 8 * hidden // 3 // 128 * 128, GPT_VOCABULARY)
    if model in EXPERTS:
        *sizes, ffn, vocabulary = EXPERTS[model]
        return sized(*sizes, ffn, vocabulary) | {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 128,
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": ffn,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
            "attention_bias": False, "router_aux_loss_coef": 0.001, "output_router_logits": False,
        }
    return published("7B", "qwen2_5_vl") if model == "qwen2.5-vl-7b" else sized(*TEXT[model])


def sizes(tp=1, pp=1, vp=1, ep=1, *, length: int, batch: int, rows: int = 1, **more) -> dict:
    return {
        "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp,
        "num_virtual_stages_per_pipeline_rank": vp, "expert_model_parallel_size": ep,
        "sequence_parallel": tp > 1, "seq_length": length, "global_batch_size": batch,
        "micro_batch_size": rows, "overlap_grad_reduce": True, **more,
    }


def gpt(layers: int, hidden: int, heads: int, tp: int, pp: int, vp: int, gpus: int, batch: int,
        tflops: float) -> Published:
    """Of Megatron-LM's README, whose FLOPs count the whole square of attention."""
    flops = 72 * batch * GPT_LENGTH * layers * hidden**2 * (
        1 + GPT_LENGTH / (6 * hidden) + GPT_VOCABULARY / (12 * hidden * layers))
    return Published(model=f"gpt {layers} {hidden} {heads}", gpu="h100-80g", gpus=gpus,
                     seconds=flops / gpus / tflops / 1e12,
                     options=sizes(tp, pp, vp, length=GPT_LENGTH, batch=batch,
                                   overlap_param_gather=True), overlapped=True)


def zoo(seconds: float, tp: int, pp: int, ep: int, *, deepep: bool = False, **more) -> Published:
    """Of Megatron-MoE-ModelZoo: 94 layers, the embedding and the logits in the place of two."""
    vp = 3 if pp == 32 else 4
    chunks = [[96 // pp // vp] * pp for _ in range(vp)]
    chunks[0][0] -= 1
    chunks[-1][-1] -= 1
    return Published(
        model="qwen3-235b-a22b", gpu="h100-80g", gpus=256, seconds=seconds, deepep=deepep,
        options=sizes(tp, pp, vp, ep, length=4096, batch=2048, expert_tensor_parallel_size=1,
                      pp_layers=json.dumps(chunks), overlap_param_gather=True, **more))


FULL, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
VL = {"freeze_vit": True, "freeze_merger": True, **FULL}
FIGURES = {
    "GPT 1.7B": gpt(24, 2048, 16, 1, 1, 1, 48, 192, 408.8),
    "GPT 7.1B": gpt(30, 4096, 32, 2, 1, 1, 96, 192, 465.9),
    "GPT 16B": gpt(32, 6144, 48, 4, 1, 1, 192, 192, 489.1),
    "GPT 32B": gpt(48, 7168, 56, 8, 1, 1, 384, 192, 459.6),
    "GPT 70B": gpt(84, 8192, 64, 8, 2, 3, 768, 384, 419.7),
    "GPT 119B": gpt(92, 10240, 80, 8, 4, 1, 1536, 768, 420.5),
    "GPT 177B": gpt(96, 12288, 96, 8, 6, 4, 2304, 1152, 432.8),
    "GPT 314B": gpt(96, 16384, 128, 8, 8, 4, 3072, 1536, 474.4),
    "GPT 462B": gpt(112, 18432, 144, 8, 16, 1, 6144, 3072, 459.9),
    "Qwen3-235B-A22B, EP32": zoo(19.7, 2, 8, 32, deepep=True, **SELECTIVE),
    "Qwen3-235B-A22B, PP32": zoo(24.2, 2, 32, 8, **SELECTIVE),
    "Qwen3-235B-A22B, TP4": zoo(29.0, 4, 8, 8, deepep=True),
    "Qwen2.5-VL-7B": Published(
        model="qwen2.5-vl-7b", gpu="a100-80g", gpus=2, seconds=4.1, image_tokens=100,
        options=sizes(2, length=2048, batch=4, **VL)),
    "Qwen2.5-VL-7B, LoRA": Published(
        model="qwen2.5-vl-7b", gpu="a100-80g", gpus=2, seconds=2.3, image_tokens=100,
        options=sizes(length=2048, batch=4, lora_rank=8, **FULL)),
    "Qwen2.5-14B": Published(
        model="qwen2-14b", gpu="a800", gpus=8, seconds=9.04,
        options=sizes(4, length=8192, batch=16, **SELECTIVE)),
    "Qwen2.5-7B": Published(
        model="qwen2-7b", gpu="a100-80g", gpus=4, seconds=23,
        options=sizes(4, length=32768, batch=8, **FULL)),
    "Qwen3-30B-A3B": Published(
        model="qwen3-30b-a3b", gpu="a800", gpus=16, seconds=9.6,
        options=sizes(2, 1, 1, 8, length=8192, batch=16, **FULL)),
}

# Not within a fifth; docs/planning.md says what is known of each.
MISSED = ("GPT 32B", "Qwen3-235B-A22B, PP32", "Qwen3-235B-A22B, TP4", "Qwen2.5-VL-7B",
          "Qwen2.5-VL-7B, LoRA", "Qwen2.5-7B", "Qwen3-30B-A3B")


def once_a_node(card: Card, nodes: float, experts: int = 8) -> Card:
    """A token that goes to `experts` of all alike goes to other nodes so much less often."""
    if nodes <= 1:
        return card
    away = experts * (1 - 1 / nodes) / ((nodes - 1) * (1 - (1 - 1 / nodes) ** experts))
    rate = card.network_gb_s * card.link_share * away
    return replace(card, rates=Rates(network=LinkRates(all_to_all=((1.0, rate),))))


def predicted(one: Published, directory: Path) -> StepTime:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(one.model)))
    card = read_card(one.gpu)
    if one.overlapped:
        card = replace(card, node_gb_s=1e6, node_latency_us=0)
    if one.deepep:
        card = once_a_node(card, one.options["expert_model_parallel_size"] / 8)
    question = Question(hf_dir=directory, gpus=one.gpus, per_node=min(8, one.gpus),
                        card=card, options={}, image_tokens=1)
    plan, length = question.plan(**one.options), one.options["seq_length"]
    rows, images = one.options["micro_batch_size"], {}
    if one.image_tokens:
        side = 2 * round(one.image_tokens**0.5)
        images = {(1, side, side): rows * length / 2 / (side // 2) ** 2}
    batch = Microbatch.of(plan, lengths=[length] * rows, trained=length * rows, images=images)
    return predict(plan, question.card, [batch], per_node=question.per_node)
