"""Adapters: which layers, which part of a factor lies where, and PEFT's files."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from commands import megatron_vl
from safetensors.torch import load_file, save_file

from megatron_vl.errors import InputError
from megatron_vl.models import family, load_spec
from megatron_vl.peft.adapter import Adapter, Factors, factor_key
from megatron_vl.peft.adapter_map import AdapterMap, blocks
from megatron_vl.peft.conversion import peft_config
from megatron_vl.peft.files import read_adapter
from megatron_vl.peft.lora import Lora, normed
from megatron_vl.peft.targets import linears, resolve
from megatron_vl.weights.map import volume
from megatron_vl.weights.rules import box

MODELS = ("model_dir", "text_model_dir", "window_model_dir", "resampler_model_dir",
          "baichuan_model_dir", "qk_norm_model_dir", "experts_model_dir", "deepstack_model_dir",
          "deepstack_experts_model_dir")
LEAVES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def weights_of(request, model: str):
    spec = load_spec(request.getfixturevalue(model))
    return family(spec.model_type).weight_map(spec)


TARGETS = [  # model, what is typed, how many layers of the LLM's 4 x and of the tower's 2 x
    ("model_dir", ["all-linear"], LEAVES, 0),
    ("model_dir", ["linear_qkv"], {"q_proj", "k_proj", "v_proj"}, 0),
    ("model_dir", ["linear_fc1", "o_proj"], {"gate_proj", "up_proj", "o_proj"}, 0),
    ("model_dir", ["q_proj", "vit"], {"q_proj"}, 2 * 4),
    ("model_dir", ["merger"], set(), 2),
    ("model_dir", [r".*layers\.\d+\.mlp\.down_proj"], {"down_proj"}, 0),
    ("model_dir", [r"model\.language_model\..*\.v_proj"], {"v_proj"}, 0),  # as transformers has it
    ("model_dir", ["attn.qkv"], set(), 2),
    ("window_model_dir", ["gate_proj"], {"gate_proj"}, 0),  # the tower has some too
    ("window_model_dir", ["vit"], set(), 2 * 5),
    ("baichuan_model_dir", ["W_pack"], {"W_pack"}, 0),
    ("resampler_model_dir", ["c_attn", "attn.c_proj", "w1", "w2"],
     {"c_attn", "c_proj", "w1", "w2"}, 0),
    ("experts_model_dir", ["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj"}, 0),
    ("deepstack_model_dir", ["q_proj", "vit"], {"q_proj"}, 4 * 4),
    ("deepstack_model_dir", ["merger"], set(), 4 * 2),  # the features' too
    ("deepstack_experts_model_dir", ["all-linear", "vit"],
     {"q_proj", "k_proj", "v_proj", "o_proj"}, 4 * 4),
]


@pytest.mark.parametrize(("model", "typed", "leaves", "others"), TARGETS)
def test_a_target_names_the_layers_that_its_user_means(model, typed, leaves, others, request):
    weights = weights_of(request, model)
    found = resolve(weights, typed)
    language = [key for key in found if "visual." not in key]
    assert {key.split(".")[-2] for key in language} == leaves
    assert len(language) == len(leaves) * weights.layers["llm"]
    assert len(found) - len(language) == others


@pytest.mark.parametrize(("typed", "says"), [
    ("q_porj", "lora-target q_porj names no linear layer of this model, which has qkv"),
    ("lm_head", "lora-target lm_head names no linear layer"),
    ("(", "lora-target ( is no regular expression"),
    ("W_pack", "lora-target W_pack names no linear layer"),
])
def test_a_target_that_names_nothing_is_refused_by_name(typed, says, request):
    with pytest.raises(InputError, match=re.escape(says)):
        resolve(weights_of(request, "model_dir"), ["q_proj", typed])


@pytest.mark.parametrize(("model", "target"), [
    ("experts_model_dir", "gate_proj"), ("deepstack_experts_model_dir", "gate_proj"),
    ("deepstack_experts_model_dir", "gate_up_proj"), ("deepstack_experts_model_dir", ".*experts.*"),
])
def test_experts_are_no_targets_and_that_is_said(model, target, request):
    with pytest.raises(InputError, match=re.escape(f"{target} names no linear layer")):
        resolve(weights_of(request, model), [target])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_the_factors_of_every_rank_make_the_published_update(model, tp, fused, request):
    """What all ranks' A and B add to the weights is s B A of each published layer, and no more.

    Every third layer has another rank, unless they are fused, every fifth none.
    """
    weights = weights_of(request, model)
    generator = np.random.default_rng(0)
    known = [one.key for number, one in enumerate(linears(weights)) if number % 5 != 4]
    adapter = Adapter(fused=fused, factors={
        key: Factors(3 if fused else 2 + number % 3, 5.0 + number)
        for number, key in enumerate(known)})
    of = AdapterMap(weights=weights, adapter=adapter)
    published = {key: generator.standard_normal(shape) for key, shape in of.published().items()}
    for one in of.whole():
        if fused:
            first, *others = (factor_key(key, "A") for key in adapter.of(one.rule))
            published |= dict.fromkeys(others, published[first])
            a, b = (one.stored(factor, tp=1, rank=0, local=True) for factor in "AB")
            assert one.numbers == a.numel + sum(
                volume(piece.shape) for piece in b.pieces if piece.key is not None)
        added = {key: np.zeros(one.rule.published()[key]) for key in one.rule.published()}
        for rank in range(tp):
            a, b = (filled(one.stored(factor, tp=tp, rank=rank, local=True), published)
                    for factor in "AB")
            shape, pieces = one.rule.pieces(tp, rank)
            factors = list(adapter.of(one.rule).values())
            spread = np.zeros((shape[0], one.blocks_of_a))
            if one.rule.axis == 1:
                spread[:, 0] = adapter.scale(factors[0])
            else:
                for at, rows, number in blocks(one.rule, adapter, tp, rank):
                    column = number % one.blocks_of_a
                    spread[at : at + rows, column] = adapter.scale(factors[number])
            wide = (b[:, None, :] * spread[:, :, None]).reshape(shape[0], -1)
            update = wide @ a
            assert update.shape == shape
            for piece in pieces:
                part = update[box(piece.at, piece.shape)]
                if piece.key is None:
                    assert not part.any()  # what fills a tower's MLP up stays zero
                else:
                    added[piece.key][box(piece.start, piece.shape)] = part
        for key, whole in added.items():
            if (factors := adapter.factors.get(key)) is None:
                assert not whole.any()
                continue
            a, b = (published[factor_key(key, factor)] for factor in "AB")
            np.testing.assert_allclose(whole, adapter.scale(factors) * b @ a, atol=1e-12)


def filled(stored, published) -> np.ndarray:
    made = np.zeros(stored.shape)
    for piece in stored.pieces:
        if piece.key is not None:
            made[box(piece.at, piece.shape)] = published[piece.key][box(piece.start, piece.shape)]
    return made


# ---- PEFT's files --------------------------------------------------------------------------------


def made_by_peft(model_dir, out, **config):
    """An adapter with random numbers, and PEFT's model."""
    base = transformers.AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.requires_grad and ".lora_A." not in name:  # lengths, and what is whole
            parameter.data *= torch.rand_like(parameter) + 0.5
    model.save_pretrained(out)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


ADAPTERS = {
    "ranks and alphas by pattern": dict(
        r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"q_proj": 7, r"layers\.1\.mlp\.down_proj": 2}, alpha_pattern={"q_proj": 3}),
    "scaled by the root of the rank": dict(
        r=9, lora_alpha=5, use_rslora=True, target_modules=["gate_proj", "o_proj"]),
    "tower and merger": dict(
        r=2, lora_alpha=8, target_modules=r".*visual\.(blocks\.\d+\.attn\.qkv|merger\.mlp\.[02])"),
    "DoRA": dict(
        r=4, lora_alpha=6, use_dora=True, use_rslora=True, target_modules=["q_proj", "down_proj"],
        rank_pattern={"q_proj": 7}, alpha_pattern={r"layers\.1\.mlp\.down_proj": 2}),
    "tied embeddings and a norm in full": dict(
        r=2, target_modules=["v_proj"], modules_to_save=["embed_tokens", "merger.ln_q"],
        ensure_weight_tying=True),
    "a head in full": dict(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    "norms in full": dict(r=2, target_modules=["v_proj"], modules_to_save=["layernorm"]),
}


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("untied") / "model"
    done = megatron_vl("tiny", out, "--untied", "--dtype", "float32", "--ranks", 300)
    assert done.code == 0, done.text
    return out


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_pefts_is_merged_as_peft_merges_it(name, model_dir, untied_dir, tmp_path):
    model_dir = untied_dir if "head" in name else model_dir
    model = made_by_peft(model_dir, tmp_path / "adapter", **ADAPTERS[name])
    done = megatron_vl("convert", model_dir, tmp_path / "merged", "--merge",
                       "--adapter", tmp_path / "adapter")
    assert done.code == 0, done.text
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    theirs = model.merge_and_unload().state_dict()
    weights = family("qwen2_vl").weight_map(load_spec(model_dir))
    changed = 0
    before = load_file(model_dir / "model.safetensors")
    for key, one in theirs.items():
        key = weights.published_name(key)
        if key in merged:
            torch.testing.assert_close(merged[key], one, rtol=0, atol=1e-6)
            changed += not torch.equal(merged[key], before[key])
    stored = read_adapter(tmp_path / "adapter", weights)
    assert changed == len(stored.adapter.factors) + len(stored.full)
    verify = "verify", model_dir, tmp_path / "merged"
    assert megatron_vl(*verify, "--adapter", tmp_path / "adapter").code == 0
    done = megatron_vl(*verify)
    assert done.code == 1 and done.out.splitlines()[-1].split()[2] == str(changed), done.text
    done = megatron_vl("convert", model_dir, tmp_path / "other", "--merge", "--base", model_dir,
                       "--adapter", tmp_path / "adapter")
    assert done.code == 2 and "leave out --base, or give it as SRC" in done.err, done.text


def test_a_merge_that_gives_no_finite_number_writes_nothing(sound, model_dir, tmp_path):
    spoilt = shutil.copytree(sound, tmp_path / "adapter")

    def edit(found) -> None:
        found[next(name for name in found if "lora_B" in name)][3, 1] = float("inf")

    tensors(spoilt, edit)
    done = megatron_vl("convert", model_dir, tmp_path / "out", "--merge", "--adapter", spoilt)
    assert done.code == 2 and "q_proj.weight are NaN or infinite in float32" in done.err, done.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", MODELS)
def test_the_expression_for_target_modules_hits_just_the_adapted_layers(model, request):
    weights = weights_of(request, model)
    known = {one.key: one for one in linears(weights)}
    for typed in (["all-linear"], ["vit"], [next(iter(known.values())).name.replace(".", r"\.")]):
        if typed == ["vit"] and "vision" not in weights.layers and "vit" not in weights.layers:
            continue
        keys = resolve(weights, typed)
        adapter = Adapter(factors=dict.fromkeys(keys, Factors(4, 8.0)))
        config = peft_config(AdapterMap(weights=weights, adapter=adapter), request.config.rootpath)
        targets = config["target_modules"]
        hit = [one.key for one in known.values()
               if (re.fullmatch(targets, one.in_memory) if isinstance(targets, str)
                   else one.in_memory in targets)]
        assert hit == keys
        assert (config["r"], config["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_is_not_rounded_to_the_weights_precision(dtype):
    """What is added is s B A x of the numbers B that the weights' precision has."""
    generator, scale = torch.Generator().manual_seed(0), 1.3085  # 1.3047 in bf16
    a, b = torch.ones(1, 1, dtype=dtype), torch.rand(4096, 1, generator=generator).to(dtype)
    lora = Lora(a, b, torch.full((4096, 1), scale), cut=0, dropout=0.0, sequence_parallel=False,
                group=torch.distributed.ProcessGroupGloo(torch.distributed.HashStore(), 0, 1))
    added = lora(torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, 4096, dtype=dtype))
    assert added.dtype == dtype
    whole = added.detach().double().sum() / b.double().sum()
    assert whole.item() == pytest.approx(scale, rel=5e-4)


@pytest.mark.parametrize("norm", [torch.nn.RMSNorm(8, eps=1e-3), torch.nn.LayerNorm(8, eps=1e-3)])
def test_an_adapter_sees_what_a_norm_within_its_layer_leaves(norm):
    """TransformerEngine's layers carry their norm under these names."""
    layer, x = torch.nn.Linear(8, 4), torch.randn(3, 2, 8)
    assert normed(layer, x) is x
    torch.nn.init.normal_(norm.weight)
    layer.normalization, layer.eps = type(norm).__name__, norm.eps
    layer.layer_norm_weight, layer.layer_norm_bias = norm.weight, getattr(norm, "bias", None)
    torch.testing.assert_close(normed(layer, x), norm(x))


def test_an_adapter_under_published_names_is_read_though_peft_would_load_nothing(
    model_dir, tmp_path
):
    made_by_peft(model_dir, tmp_path / "a", r=2, target_modules=["q_proj"])
    tensors(tmp_path / "a", lambda held: held.update(
        {name.replace("language_model.", ""): held.pop(name) for name in list(held)}))
    change(tmp_path / "a", alpha_pattern={r"model\.layers\.1\.self_attn\.q_proj": 5})
    weights = family("qwen2_vl").weight_map(load_spec(model_dir))
    factors = read_adapter(tmp_path / "a", weights).adapter.factors
    assert [one.alpha for one in factors.values()] == [8, 5, 8, 8]


REFUSED = {  # what is wrong with an adapter's directory, and what is said of it
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no factors": (lambda d: (d / "adapter_model.safetensors").unlink(),
                   "has no adapter_model.safetensors"),
    "pickled factors": (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
                        "adapter_model.bin is not read; load the adapter with PEFT"),
    "DoRA without lengths": (lambda d: change(d, use_dora=True),
                             "says DoRA, and adapter_model.safetensors has no lora_magnitude"),
    "biases": (lambda d: change(d, bias="all"), "describes an adapter with biases (all)"),
    "a layer that is to be whole": (lambda d: change(d, modules_to_save=["lm_head"]),
                                    "has lm_head in modules_to_save, which adapter_model"),
    "another vocabulary": (lambda d: tensors(d, lambda t: t.update(
        {"base_model.model.lm_head.weight": torch.zeros(3, 128)})), "of shape [3, 128], which"),
    "tokens that it begins at": (lambda d: change(d, alora_invocation_tokens=[1, 2]),
                                 "that begins at certain tokens (aLoRA)"),
    "beside other weights": (lambda d: change(d, init_lora_weights="pissa_niter_4"),
                             "beside what its beginning, pissa_niter_4, left of the weights"),
    "random factors": (lambda d: change(d, monteclora_config={"use_monteclora": True}),
                       "of random factors (MonteCLoRA)"),
    "no alpha": (lambda d: change(d, lora_alpha=0), "lora_alpha"),
    "no rank": (lambda d: tensors(d, lambda t: t.update(
        {name: one[:0] if "lora_A" in name else one[:, :0] for name, one in t.items()})),
        "does not fit"),
    "a number": (lambda d: tensors(d, lambda t: t.update(
        {name: torch.tensor(1.0) for name in t})), "does not fit"),
    "a name of two lines": (lambda d: tensors(d, lambda t: t.update({"a\nb": torch.ones(1)})),
                            "layer(s) that this model has not"),
    "a broken pattern": (lambda d: change(d, alpha_pattern={"q_proj(": 3}),
                         "has the pattern q_proj(, which is no regular expression"),
    "another kind": (lambda d: change(d, peft_type="IA3"), "of the kind IA3"),
    "half of a layer": (lambda d: tensors(d, lambda t: t.pop(next(iter(t)))), "lacks model.layers"),
    "another model's layer": (lambda d: tensors(d, lambda t: t.update(
        {name.replace("q_proj", "W_pack"): t.pop(name) for name in list(t)})),
        "layer(s) that this model has not"),
    "another rank": (lambda d: change(d, r=3), "q_proj has rank 3, and its factors in "),
    "another size": (lambda d: tensors(d, lambda t: t.update(
        {name: one[..., :-1].contiguous() for name, one in t.items()})), "does not fit"),
}


def test_tied_embeddings_that_were_trained_apart_are_refused(model_dir, tmp_path):
    """PEFT trains a copy of each that modules_to_save names, unless ensure_weight_tying is set."""
    for names, says in ((["embed_tokens"], "has the embedding alone, which this model has in one"),
                        (["lm_head"], "has the head alone, which this model has in one"),
                        (["embed_tokens", "lm_head"], "is stored twice and the copies differ")):
        made_by_peft(model_dir, tmp_path / "adapter", r=2, target_modules=["v_proj"],
                     modules_to_save=names)
        done = megatron_vl("convert", model_dir, tmp_path / "out", "--merge",
                           "--adapter", tmp_path / "adapter")
        assert done.code == 2 and says in done.err, done.text


def test_what_is_merged_but_not_trained_is_refused_for_training(model_dir, tmp_path):
    for more, says in ((dict(use_dora=True), "is DoRA, from which no training begins; merge it"),
                       (dict(modules_to_save=["merger.ln_q"]),
                        "has layers trained in full (visual.merger.ln_q.weight, ")):
        made_by_peft(model_dir, tmp_path / "a", r=2, target_modules=["q_proj"], **more)
        done = megatron_vl("train", "--load", model_dir, "--adapter", tmp_path / "a", "--dry-run",
                           "--train-data-path", tmp_path)
        assert done.code == 2 and says in done.err, done.text


def test_a_merge_in_bf16_is_computed_in_fp32_and_rounded_once(model_dir, tmp_path):
    low = tmp_path / "low"
    assert megatron_vl("convert", model_dir, low, "--to", "hf", "--dtype", "bf16").code == 0
    model = made_by_peft(low, tmp_path / "adapter", **ADAPTERS["DoRA"])  # in fp32
    done = megatron_vl("convert", low, tmp_path / "merged", "--merge",
                       "--adapter", tmp_path / "adapter")
    assert done.code == 0, done.text
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    theirs = model.merge_and_unload().state_dict()
    weights = family("qwen2_vl").weight_map(load_spec(low))
    for key in read_adapter(tmp_path / "adapter", weights).adapter.factors:
        one = theirs[weights.in_memory_name(key)].bfloat16()
        assert merged[key].dtype == torch.bfloat16
        assert (merged[key] != one).float().mean() < 1e-3  # in fp32 they lie between two numbers
        torch.testing.assert_close(merged[key], one, rtol=2**-7, atol=0)


def change(folder, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tensors(folder, edit) -> None:
    path = folder / "adapter_model.safetensors"
    found = load_file(path)
    edit(found)
    save_file(found, path)


@pytest.fixture(scope="module")
def sound(model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter") / "sound"
    made_by_peft(model_dir, out, r=2, target_modules=["q_proj"])
    return out


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_cannot_be_read_is_refused_by_what_is_wrong(
    name, sound, model_dir, tmp_path
):
    break_it, says = REFUSED[name]
    broken = shutil.copytree(sound, tmp_path / "adapter")
    break_it(broken)
    done = megatron_vl("convert", model_dir, tmp_path / "out", "--merge", "--adapter", broken)
    assert done.code == 2 and says in done.err, done.text
    assert not (tmp_path / "out").exists()
    for words in ([], ["--dry-run"]):
        done = megatron_vl("train", "--load", model_dir, "--adapter", broken, *words,
                           "--train-data-path", tmp_path)
        assert done.code == 2 and says in done.err, done.text
