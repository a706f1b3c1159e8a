"""What a step had to compute, and how much of what the devices can do that is."""

import copy

import peft
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from megatron_vl.models import family, load_spec
from megatron_vl.peft.adapter import Adapter, Factors
from megatron_vl.peft.adapter_map import AdapterMap
from megatron_vl.peft.targets import resolve
from megatron_vl.peft.trainable import Trainable
from megatron_vl.platform.peaks import peak_tflops
from megatron_vl.training.reporting.flops import step_flops, utilization

LENGTHS, GRIDS = [20, 7, 13], [(1, 4, 4), (2, 8, 6)]


@pytest.fixture(scope="module")
def whole(model_dir):
    """The tiny model with every tensor in fp32, and its spec."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    return model, load_spec(model_dir)


def counted(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "length"), [
    ("model_dir", 1), ("model_dir", 16), ("model_dir", 50), ("qk_norm_model_dir", 50),
    ("experts_model_dir", 50), ("deepstack_model_dir", 50), ("deepstack_experts_model_dir", 50),
])
def test_flops_are_those_that_torch_counts_in_transformers_language_model(name, length, request):
    hf_dir = request.getfixturevalue(name)
    spec = load_spec(hf_dir)
    model = family(spec.model_type).judge().from_pretrained(
        hf_dir, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        found = counted(lambda: model(input_ids=torch.full((1, length), 5)))
    # What is masked away is computed there and not needed: of L^2 pairs L (L - 1) / 2.
    width = spec.decoder.num_layers * spec.decoder.num_attention_heads * spec.decoder.head_dim
    masked = 2 * 2 * width * length * (length - 1) // 2
    # The rotary angles are a matrix product too: not a thousandth of it all.
    assert spec.decoder.forward_flops([length], length) + masked == pytest.approx(found, rel=2e-3)


def test_samples_of_a_row_do_not_see_each_other_and_only_trained_tokens_have_logits(spec):
    decoder = spec.decoder
    apart = sum(decoder.forward_flops([length], 0) for length in LENGTHS)
    assert decoder.forward_flops(LENGTHS, 0) == apart < decoder.forward_flops([sum(LENGTHS)], 0)
    logits = decoder.forward_flops(LENGTHS, 3) - apart
    assert logits == 2 * 3 * decoder.hidden_size * decoder.vocab_size


FROZEN = [(), ("vit",), ("llm",), ("vit", "merger"), ("merger", "llm"), ("vit", "llm")]


def test_an_adapter_s_are_those_that_torch_counts_with_peft(whole):
    model, spec = whole
    adapted = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rank, length, decoder = 16, 70, spec.decoder
    model = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(
        r=rank, target_modules=list(adapted)))
    ids = torch.full((1, length), 5)
    found = counted(lambda: model(input_ids=ids).logits.sum().backward())
    weights = family(spec.model_type).weight_map(spec)
    keys = resolve(weights, ["all-linear"])
    trainable = Trainable(frozen=("vit", "merger", "llm"), adapter=AdapterMap(
        weights=weights, adapter=Adapter(factors=dict.fromkeys(keys, Factors(rank, 1.0)))))
    _, language = step_flops(
        spec, grids=[], lengths=[length], trained=length, trainable=trainable)
    width = decoder.num_layers * decoder.num_attention_heads * decoder.head_dim
    masked = 3 * 2 * 2 * width * length * (length - 1) // 2
    heads = decoder.num_attention_heads + 2 * decoder.num_query_groups
    # The input of the first layer needs no gradient, of q, k and v and of their factors.
    first = 2 * length * decoder.hidden_size * (heads * decoder.head_dim + 3 * rank)
    assert language + masked - first == pytest.approx(found, rel=0.003)


@pytest.mark.parametrize("frozen", FROZEN, ids="+".join)
def test_forward_and_backward_are_those_that_torch_counts(frozen, whole):
    model, spec = whole
    for name, weight in model.named_parameters():
        part = "merger" if ".merger.mlp" in name else "vit" if ".visual" in name else "llm"
        weight.requires_grad_(part not in frozen)
    length, grid = 70, (1, 16, 16)
    merged = 64
    ids = torch.full((1, length), 5)
    ids[0, 2 : 2 + merged] = spec.tokens.image

    def work():
        logits = model(
            input_ids=ids, pixel_values=torch.rand(256, spec.vision.patch_dim),
            image_grid_thw=torch.tensor([grid]), mm_token_type_ids=(ids == spec.tokens.image).int(),
        ).logits
        logits.sum().backward()

    found = counted(work)
    vision, language = step_flops(
        spec, grids=[grid], lengths=[length], trained=length, trainable=Trainable(frozen=frozen)
    )
    decoder = spec.decoder
    width = decoder.num_layers * decoder.num_attention_heads * decoder.head_dim
    masked = 3 * 2 * 2 * width * length * (length - 1) // 2
    # The input of the first that is trained needs no gradient, which only so few layers show.
    first = 0
    if "vit" not in frozen:
        first = 2 * 256 * spec.vision.patch_dim * spec.vision.hidden_size
    elif "merger" not in frozen:
        first = 2 * merged * spec.vision.merged_size**2
    assert vision + language + masked - first == pytest.approx(found, rel=0.003)


def test_nothing_frozen_is_three_times_the_forward_pass(spec):
    vision, language = step_flops(spec, grids=GRIDS, lengths=LENGTHS, trained=9)
    assert vision == 3 * sum(map(spec.vision.forward_flops, GRIDS))
    assert language == 3 * spec.decoder.forward_flops(LENGTHS, 9)


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA A800 80GB PCIe", 312.0),
    ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H20", 148.0),
    ("NVIDIA H200", 989.0), ("NVIDIA L40S", 362.0), ("NVIDIA L40", 181.0),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 D", 147.0),
    ("Ascend910B1", 373.9), ("Ascend910B2C", 354.0), ("Ascend910B3", 294.9),
    ("Ascend910B4-1", 245.8), ("Ascend910B", 354.0), ("Ascend910_9362", 354.0),
    ("Ascend950PR_9579", 432.0), ("Ascend910ProB", None), ("Ascend310P3", None),
    ("NVIDIA RTX A4000", None), ("Tesla V100-SXM2-16GB", None), ("x86_64", None),
])
def test_a_device_s_peak_is_known_by_its_name_or_not_at_all(name, peak):
    assert peak_tflops(name) == peak


def test_utilization_is_a_part_of_all_devices_peak():
    assert utilization(4e12, seconds=2.0, ranks=4, peak=1e12) == 0.5
    assert utilization(4e12, seconds=2.0, ranks=4, peak=None) is None


def test_flops_are_those_that_torch_counts_in_a_tower_with_a_resampler(resampler_model_dir):
    spec = load_spec(resampler_model_dir)
    visual = family("qwen").judge().from_pretrained(resampler_model_dir).transformer["visual"]
    with torch.no_grad():
        found = counted(lambda: visual(torch.rand(16, spec.vision.patch_dim)))
    assert spec.vision.forward_flops(spec.vision.only_grid) == found
