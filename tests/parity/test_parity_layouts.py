"""Logits, loss and every gradient against transformers, in every layout, on real gloo ranks."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import tiny_hf
from commands import megatron_vl

# fp32: sums run in another order over tensor-parallel ranks and packed rows, and nothing else.
TOLERANCE = "1e-5"

# Every layout that fits four language layers and two key/value heads: named here, so that one that
# falls out of the sweep is noticed.
LAYOUTS = {
    2: """
        TP1xPP1xDP2, llm 4, vision 2
        TP1xPP2xDP1, llm 2-2, vision 2-0
        TP1xPP2xDP1, llm 1-3, vision 2-0
        TP1xPP2xDP1, llm 0-4, vision 1-1
        TP1xPP2xVP2xDP1, llm 1-1/1-1, vision 2-0/0-0
        TP1xPP2xVP2xDP1, llm 0-2/1-1, vision 1-1/0-0
        TP2xPP1xDP1, llm 4, vision 2
        TP2xPP1xDP1+SP, llm 4, vision 2
        TP2xPP1xDP1+SP+VDP, llm 4, vision 2
        TP1xPP1xCP2xDP1, llm 4, vision 2
    """,
    4: """
        TP1xPP1xDP4, llm 4, vision 2
        TP1xPP2xDP2, llm 2-2, vision 2-0
        TP1xPP2xDP2, llm 1-3, vision 2-0
        TP1xPP2xDP2, llm 0-4, vision 1-1
        TP1xPP2xVP2xDP2, llm 1-1/1-1, vision 2-0/0-0
        TP1xPP2xVP2xDP2, llm 0-2/1-1, vision 1-1/0-0
        TP1xPP4xDP1, llm 1-1-1-1, vision 2-0-0-0
        TP1xPP4xDP1, llm 0-2-1-1, vision 1-1-0-0
        TP2xPP1xDP2, llm 4, vision 2
        TP2xPP1xDP2+SP, llm 4, vision 2
        TP2xPP1xDP2+SP+VDP, llm 4, vision 2
        TP2xPP2xDP1, llm 2-2, vision 2-0
        TP2xPP2xDP1, llm 1-3, vision 2-0
        TP2xPP2xDP1+SP, llm 2-2, vision 2-0
        TP2xPP2xDP1+SP, llm 1-3, vision 2-0
        TP2xPP2xDP1+SP, llm 0-4, vision 1-1
        TP2xPP2xDP1+SP+VDP, llm 0-4, vision 1-1
        TP2xPP2xVP2xDP1, llm 1-1/1-1, vision 2-0/0-0
        TP2xPP2xVP2xDP1+SP, llm 1-1/1-1, vision 2-0/0-0
        TP2xPP2xVP2xDP1+SP, llm 0-2/1-1, vision 1-1/0-0
        TP2xPP2xVP2xDP1+SP+VDP, llm 0-2/1-1, vision 1-1/0-0
        TP4xPP1xDP1, llm 4, vision 2
        TP4xPP1xDP1+SP, llm 4, vision 2
        TP4xPP1xDP1+SP+VDP, llm 4, vision 2
        TP1xPP1xCP2xDP2, llm 4, vision 2
        TP1xPP2xCP2xDP1, llm 2-2, vision 2-0
        TP1xPP2xCP2xDP1, llm 1-3, vision 2-0
        TP1xPP2xCP2xDP1, llm 0-4, vision 1-1
        TP1xPP2xVP2xCP2xDP1, llm 1-1/1-1, vision 2-0/0-0
        TP1xPP2xVP2xCP2xDP1, llm 0-2/1-1, vision 1-1/0-0
        TP2xPP1xCP2xDP1, llm 4, vision 2
        TP2xPP1xCP2xDP1+SP, llm 4, vision 2
        TP2xPP1xCP2xDP1+SP+VDP, llm 4, vision 2
        TP1xPP1xCP4xDP1, llm 4, vision 2
    """,
}




def with_vision(layouts: str) -> list[str]:
    return [line.strip() for line in layouts.strip().splitlines()]


def of_text(layouts: str) -> list[str]:
    """The same without a tower: no language layer makes room for one, no image is divided."""
    return [line.rpartition(", vision ")[0] for line in with_vision(layouts)
            if line.endswith(("vision 2", "-0", "-0-0-0", "/0-0")) and "+VDP" not in line
            and "vision 1-1" not in line]


def of_experts(layouts: str) -> list[str]:
    """The same again, where tensor parallelism divides tokens too, with experts over two ranks."""
    found = []
    for line in of_text(layouts):
        if line.startswith("TP1x") or "+SP" in line:
            found.append(line)
            if "PP1" in line:
                etp = "ETP1x" if "TP2x" in line else ""
                found.append(line.replace("DP", f"EP2x{etp}DP"))
    return found


# Of six language layers the first three add a feature each, of which some travel.
FEATURES = """
    TP1xPP1xDP2, llm 6, vision 4
    TP1xPP2xDP1, llm 3-3, vision 4-0
    TP1xPP2xDP1, llm 1-5, vision 4-0
    TP1xPP2xDP1, llm 2-4, vision 4-0
    TP1xPP2xDP1, llm 5-1, vision 4-0
    TP1xPP2xDP1, llm 0-6, vision 4-0
    TP1xPP2xDP1, llm 0-6, vision 2-2
    TP1xPP2xVP2xDP1, llm 1-2/1-2, vision 4-0/0-0
    TP1xPP2xVP2xDP1, llm 2-1/2-1, vision 4-0/0-0
    TP1xPP2xVP2xDP1, llm 0-0/0-6, vision 1-1/1-1
    TP2xPP1xDP1, llm 6, vision 4
    TP2xPP1xDP1+SP, llm 6, vision 4
    TP2xPP1xDP1+SP+VDP, llm 6, vision 4
    TP1xPP1xCP2xDP1, llm 6, vision 4
"""
MODELS = {"model_dir": ("81", with_vision), "window_model_dir": ("80", with_vision),
          "text_model_dir": ("50", of_text), "resampler_model_dir": ("77", with_vision),
          "qk_norm_model_dir": ("46", of_text), "experts_model_dir": ("86", of_experts),
          "six_layers_dir": ("143", lambda _: with_vision(FEATURES))}
FEATURED = "six_layers_dir"


@pytest.fixture(scope="module")
def six_layers_dir(tmp_path_factory):
    """Qwen3-VL with twice as many language layers as there are features."""
    return tiny_hf.make(
        tmp_path_factory.mktemp("six") / "layers", "--init-std", "0.02", "--model-type", "qwen3_vl",
        "--num-layers", "6", "--dtype", "float32",
    )


CASES = ["one image", "images and videos", "text only", "a microbatch without images"]
FIGURE = r"(\d\.\de[+-]\d+)"


def rows_of(sweep: str) -> list[tuple[str, float, str]]:
    """(name, largest figure, how many parameters) of each row of a sweep."""
    found = re.findall(rf"^(.+?){rf' +{FIGURE}' * 3}  .*\(of (\d+)\)$", sweep, re.M)
    return [(name, max(map(float, figures)), count) for name, *figures, count in found]


def cases_of(table: str) -> dict[str, list[float]]:
    """Absolute and relative figures of logits, loss and gradients, by the row's name."""
    found = re.findall(rf"^ *(.+?){rf' +{FIGURE}' * 6}$", table, re.M)
    return {name: list(map(float, figures)) for name, *figures in found}


def parameters_of(table: str) -> int:
    """How many parameters were compared; the five furthest off are named, the furthest first."""
    title = r"^furthest of (\d+) parameters +absolute +relative  case$"
    count = int(re.search(title, table, re.M)[1])
    found = re.findall(rf"^([a-z][\w.]+) +{FIGURE} +{FIGURE}  ({'|'.join(CASES)})$", table, re.M)
    relative = [float(one) for _, _, one, _ in found]
    assert len(found) == 5 and relative == sorted(relative, reverse=True), table
    # What is furthest off in the table of cases is the first of these.
    assert relative[0] == max(figures[5] for figures in cases_of(table).values())
    return count


# Coefficients with which a router's losses are as large as what else its gradient comes from.
BALANCED = {"experts_model_dir": [
    "--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", 0.5,
    "--moe-z-loss-coeff", 0.1, "--moe-grouped-gemm", "on", "--recompute", "selective"]}


# The last batch has all its images on one data rank; overlapped, every weight must still report a
# gradient, or the others wait forever. Rows of one sample differ in length from microbatch to
# microbatch.
@pytest.mark.parametrize(("ranks", "options", "model"), [
    pytest.param(ranks, [*options, *BALANCED.get(model, [])], model, id=f"{ranks}-{model}")
    for ranks, options, models in (
        (2, ["--overlap-grad-reduce", "--no-pack", "--cross-entropy-chunks", 64],
         [one for one in MODELS if one != FEATURED]),
        (2, ["--overlap-grad-reduce", "--no-pack", "--recompute", "full"], [FEATURED]),
        # The resampler has two heads; what Qwen3 adds to a layer meets nothing new on four ranks.
        (4, [], ["model_dir", "window_model_dir", "text_model_dir"]),
    ) for model in models
])
def test_every_layout_equals_transformers(ranks, options, model, request):
    parameters, layouts = MODELS[model]
    done = megatron_vl("parity", request.getfixturevalue(model), "--tolerance", TOLERANCE,
                       "--sweep", ranks, *options)
    assert done.code == 0, done.text
    rows = rows_of(done.out)
    assert [name for name, *_ in rows] == layouts(LAYOUTS[ranks])
    assert all(figure <= float(TOLERANCE) and count == parameters for _, figure, count in rows)


# Features and experts are tried above, each in every layout; here in the same layers.
def test_layers_with_features_and_experts_equal_transformers(deepstack_experts_model_dir):
    done = megatron_vl("parity", deepstack_experts_model_dir, "--tolerance", TOLERANCE,
                       "--pp", 2, "--vp", 2, "--recompute", "full")
    assert done.code == 0, done.text
    assert parameters_of(done.out) == 161


# Layers that are adapted, and how many factors that makes; those alike on two tensor-parallel ranks
# are compared twice. Fused, of the second w1 and w2, of the third q, k and v have one A.
ADAPTED = {
    "model_dir": (["llm", "vit", "merger"], 2 * (4 * 7 + 2 * 4 + 2), []),
    "resampler_model_dir": (["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_fc"], 2 * (4 * 4 + 2),
                            ["--lora-fused"]),
    "experts_model_dir": (["all-linear"], 2 * 4 * 4, ["--lora-fused",
        "--moe-router-load-balancing-type", "global_aux_loss", "--moe-aux-loss-coeff", 0.5]),
}


@pytest.mark.parametrize("model", ADAPTED)
def test_every_layout_of_an_adapter_equals_peft(model, request):
    targets, factors, more = ADAPTED[model]
    layouts = MODELS[model][1](LAYOUTS[2])
    done = megatron_vl("parity", request.getfixturevalue(model), "--tolerance", TOLERANCE,
                       "--sweep", 2, "--lora-rank", 3, "--recompute", "full",
                       "--cross-entropy-chunks", 64,
                       "--lora-target", *targets, *more)
    assert done.code == 0, done.text
    rows = rows_of(done.out)
    assert [name for name, *_ in rows] == layouts
    assert all(figure <= float(TOLERANCE) for _, figure, _ in rows)
    for name, _, count in rows:
        twice = "TP2" in name and "VDP" not in name
        assert int(count) == factors * 3 // 2 if twice else factors, name


def test_an_adapter_of_the_tower_alone_equals_pefts_also_where_no_image_reaches_it(
    deepstack_model_dir
):
    done = megatron_vl("parity", deepstack_model_dir, "--tolerance", TOLERANCE, "--lora-rank", 3,
                       "--lora-target", "merger")
    assert done.code == 0, done.text
    assert parameters_of(done.out) == 2 * 4 * 2  # with the features' mergers


@pytest.mark.parametrize(("model", "options"), [
    ("wide_model_dir", ["--quantize-base", "nf4", "--tp", 2, "--sequence-parallel",
                        "--recompute", "full"]),
    ("wide_experts_model_dir", ["--quantize-base", "int8", "--sweep", 2,
                                "--moe-aux-loss-coeff", 0.5]),
])
def test_an_adapter_beside_quantised_weights_equals_pefts_beside_their_values(
    model, options, request
):
    model = request.getfixturevalue(model)
    done = megatron_vl("parity", model, "--tolerance", TOLERANCE, "--lora-rank", 3, *options)
    assert done.code == 0 and f"beside weights in {options[1]}" in done.out, done.text
    if "--sweep" in options:
        assert [name for name, *_ in rows_of(done.out)] == of_experts(LAYOUTS[2])


@pytest.mark.parametrize(("options", "says"), [
    (["--lora-rank", 3, "--tp", 2], "8 of 16 quantised weights (linear_proj.weight, "
     "linear_fc2.weight of every layer) have rows on a rank of TP 2 that are no multiple of 64"),
    ([], "--quantize-base is about the weights beside an adapter; give --lora-rank"),
])
def test_quantised_weights_that_transformers_cannot_judge_are_refused(options, says, model_dir):
    done = megatron_vl("parity", model_dir, "--quantize-base", "nf4", *options)
    assert done.code == 2 and says in done.err, done.text


def test_experts_of_which_several_ranks_have_parts_equal_transformers(experts_model_dir):
    done = megatron_vl("parity", experts_model_dir, "--tolerance", TOLERANCE, "--tp", 2,
                       "--sequence-parallel", "--ep", 2, "--dp", 2, "--recompute", "full",
                       "--moe-grouped-gemm", "on")
    assert done.code == 0, done.text
    assert parameters_of(done.out) == 86


def test_an_untied_model_with_rows_that_pad_the_vocabulary_equals_transformers(tmp_path):
    odd = tiny_hf.make(tmp_path / "odd", "--init-std", "0.02", "--untied", vocab_size=277)
    layout = ["--tp", 2, "--pp", 2, "--sequence-parallel"]
    done = megatron_vl("parity", odd, "--tolerance", TOLERANCE, *layout)
    assert done.code == 0, done.text
    assert parameters_of(done.out) == 82


def test_a_normalised_head_equals_its_judge_also_with_rows_that_pad_it(
    baichuan_model_dir, tmp_path
):
    odd = shutil.copytree(baichuan_model_dir, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text()) | {"vocab_size": 1001}
    (odd / "config.json").write_text(json.dumps(config))
    tiny_hf.write_weights(odd)
    done = megatron_vl("parity", odd, "--tolerance", TOLERANCE, "--sweep", 2,
                       "--cross-entropy-chunks", 64)
    assert done.code == 0, done.text
    rows = rows_of(done.out)
    assert [name for name, *_ in rows] == of_text(LAYOUTS[2])
    assert all(figure <= float(TOLERANCE) and count == "31" for _, figure, count in rows)


def test_a_vision_tower_over_every_chunk_equals_transformers(tmp_path):
    deep = tiny_hf.make(tmp_path / "deep", "--init-std", "0.02", "--vision-depth", "4")
    for layout in (
        ["--pp", 4, "--vit-pp-layers", "1,1,1,1", "--pp-layers", "0,0,0,4"],
        ["--pp", 2, "--vp", 2, "--vit-pp-layers", "[[1,1],[2,0]]", "--pp-layers", "[[0,0],[2,2]]"],
    ):
        done = megatron_vl("parity", deep, "--tolerance", TOLERANCE, *layout)
        assert done.code == 0, done.text
        assert parameters_of(done.out) == 105


@pytest.mark.quick
def test_one_rank_equals_transformers_and_an_unmet_tolerance_names_the_cases(model_dir):
    done = megatron_vl("parity", model_dir, "--tolerance", "1e-12")
    cases = cases_of(done.out)
    assert list(cases) == CASES and parameters_of(done.out) == 81
    assert all(max(figures[1::2]) <= float(TOLERANCE) for figures in cases.values())
    # transformers takes every sample alone: two of them packed into a row lose nothing.
    assert all(figures[3] <= 1e-6 for figures in cases.values())
    assert done.code == 1
    assert "images and videos" in done.err and "further than 1e-12" in done.err


@pytest.mark.cold
def test_bfloat16_is_no_further_off_than_twice_transformers_own(model_dir):
    """Unpacked and recomputed as well, over tensor-parallel ranks that share norms."""
    done = megatron_vl("parity", model_dir, "--dtype", "bfloat16", "--no-pack", "--recompute",
                       "full", "--recompute-num-layers", 2, "--tp", 2, "--sequence-parallel")
    assert done.code == 0, done.text
    assert "bf16, one sample a row, full recompute (uniform 2); against transformers" in done.out
    rows = re.findall(rf"^ *(.+?){rf' +{FIGURE}' * 6}$", done.out, re.M)
    assert [name for name, *_ in rows] == [
        one for case in CASES for one in (case, "transformers itself")]
    # 16 bits they are on both sides: far from fp32's 1e-5.
    assert all(float(figures[1]) > 1e-4 for _, *figures in rows)


def test_what_cannot_be_compared_is_refused(model_dir):
    done = megatron_vl("parity", model_dir, "--sweep", 2, "--tp", 2)
    assert done.code == 2 and "leave out --tp" in done.err
    done = megatron_vl("parity", model_dir, "--dp", 3)
    assert done.code == 2 and "dp 3 does not divide the 4 microbatches" in done.err
    done = megatron_vl("parity", model_dir, "--tolerance", "nan")
    assert done.code == 2 and "--tolerance is nan" in done.err
    done = megatron_vl("parity", model_dir, "--recompute", "full", "--recompute-num-layers", 3)
    assert done.code == 2 and "recompute-num-layers 3 does not divide" in done.err
    done = megatron_vl("parity", model_dir, "--cross-entropy-chunks", 0)
    assert done.code == 2 and "--cross-entropy-chunks is 0; give a whole number" in done.err
    done = megatron_vl("parity", model_dir, "--cross-entropy-chunks", 4)
    assert done.code == 2 and "are trained; give 22 or more" in done.err
    done = megatron_vl("parity", model_dir, "--sweep", 7)
    assert done.code == 2 and "no layout of --sweep 7 ranks fits" in done.err
