"""Random models in random layouts: what must hold for every one of them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convert import assert_is_reference, convert
from tiny_hf import assert_equal, make, read, write_weights

from megatron_vl.errors import InputError
from megatron_vl.models import family, load_spec
from megatron_vl.parallel import Layout
from megatron_vl.weights import make_plan
from megatron_vl.weights.rules import box


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Config and tokenizer that every drawn model starts from."""
    return make(tmp_path_factory.mktemp("hf") / "template")


@st.composite
def models(draw) -> dict:
    """What config.json says of a model that TP 1, 2 and 4 divide."""
    groups = draw(st.sampled_from([1, 2, 4]))
    heads = 4 * draw(st.integers(1, 2))
    head_dim = 8 * draw(st.integers(1, 2))
    hidden = heads * head_dim
    vision_heads = 4
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": 4 * draw(st.integers(3, 9)),
        "vocab_size": draw(st.integers(265, 290)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "tie_word_embeddings": draw(st.booleans()),
        "torch_dtype": draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        "mrope_section": [head_dim // 8, head_dim // 8, head_dim // 4],
        "vision": {
            "depth": draw(st.integers(1, 4)), "num_heads": vision_heads,
            "embed_dim": vision_heads * 4 * draw(st.integers(1, 2)),
            "patch_size": draw(st.sampled_from([2, 14])), "mlp_ratio": draw(st.integers(1, 3)),
        },
    }


@st.composite
def layouts(draw, layers: int, depth: int) -> dict:
    """TP and, for each tower, the layers of each chunk: any split that is allowed."""
    pp = draw(st.sampled_from([1, 2, 3]))
    vp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    chunks = pp * vp
    vit = [1] + [0] * (chunks - 1)
    for _ in range(depth - 1):
        vit[draw(st.integers(0, chunks - 1))] += 1
    last = max(i for i, n in enumerate(vit) if n)
    llm = [0] * chunks
    for _ in range(layers):
        llm[draw(st.integers(last, chunks - 1))] += 1
    vit, llm = ([row[i * pp : (i + 1) * pp] for i in range(vp)] for row in (vit, llm))
    return {"tp": draw(st.sampled_from([1, 2, 4])), "llm": llm, "vit": vit}


def options(layout: dict) -> list:
    return ["--tp", layout["tp"], "--pp", len(layout["llm"][0]), "--vp", len(layout["llm"]),
            "--pp-layers", json.dumps(layout["llm"]), "--vit-pp-layers", json.dumps(layout["vit"])]


def write_model(template, out, model: dict, seed: int) -> None:
    config = json.loads((template / "config.json").read_text())
    vision, sections = model.pop("vision"), model.pop("mrope_section")
    config |= model
    config["vision_config"] |= vision | {"hidden_size": model["hidden_size"]}
    config["rope_scaling"]["mrope_section"] = sections
    config["initializer_range"] = 0.5
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    write_weights(out, seed)


@settings(max_examples=25, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_model_goes_through_any_two_layouts_and_back(data, template, tmp_path):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    source, one, two, back = (tmp_path / "run" / name for name in ("hf", "one", "two", "back"))
    (tmp_path / "run").mkdir()
    model = data.draw(models())
    sizes = model["num_hidden_layers"], model["vision"]["depth"]
    write_model(template, source, model, data.draw(st.integers(0, 99)))
    first, second = data.draw(layouts(*sizes)), data.draw(layouts(*sizes))
    convert(source, one, *options(first))
    assert_is_reference(source, one, **first)
    convert(one, two, *options(second))
    assert_is_reference(source, two, **second)
    convert(two, back)
    assert_equal(read(back), read(source))


@settings(max_examples=40, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_plan_writes_every_element_once_and_uses_every_tensor(data, template, tmp_path):
    shutil.rmtree(tmp_path / "hf", ignore_errors=True)
    model = data.draw(models())
    sizes = model["num_hidden_layers"], model["vision"]["depth"]
    write_model(template, tmp_path / "hf", model, 0)
    spec = load_spec(tmp_path / "hf")
    weights = family(spec.model_type).weight_map(spec)

    def inventory(layout):
        split = spec.split(pp=len(layout["llm"][0]), vp=len(layout["llm"]), llm=layout["llm"],
                           vit=layout["vit"])
        return weights.mcore_inventory(
            split=split, layout=Layout(tp=layout["tp"], pp=split.pp, vp=split.vp))

    kinds = [weights.hf_inventory(), inventory(data.draw(layouts(*sizes))),
             inventory(data.draw(layouts(*sizes)))]
    source = data.draw(st.sampled_from(kinds))
    target = data.draw(st.sampled_from(kinds))
    plan = make_plan(source, target)
    assert [one.target for one in plan.tensors] == target
    used = set()
    for one in plan.tensors:
        written = np.zeros(one.target.shape, int)
        for op in one.ops:
            written[box(op.at, op.shape)] += 1
            used.add(op.source.id)
        assert written.max(initial=0) == 1
        assert (written == 0).sum() == one.zeros
        assert one.zeros == 0 or "embed" in one.target.name or "output_layer" in one.target.name
    twins = {twin.second.id for twin in plan.twins}
    assert used | twins == {stored.id for stored in source}
    # Any tensor less, and the conversion is refused by its name.
    if source is kinds[0]:
        lost = data.draw(st.sampled_from(source))
        with pytest.raises(InputError, match=lost.name):
            make_plan([stored for stored in source if stored is not lost], target)
