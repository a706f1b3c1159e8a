"""Conversions by the command, against a plain reference and back, bit by bit."""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from common_forms import as_of_0_18, as_of_0_19, without_common
from safetensors.torch import load_file, save_file
from tiny_hf import ROOT, assert_equal, make, read, read_mcore, reference_ranks

from megatron_vl.cli.main import run
from megatron_vl.errors import InputError
from megatron_vl.models import load_spec, tower_spec
from megatron_vl.weights import inspect_checkpoint, load_rank, reshard


@pytest.fixture(scope="session")
def tied(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hf") / "tied")


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hf") / "untied", "--untied", "--dtype", "float32")


@pytest.fixture(scope="session")
def odd_vocab(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hf") / "odd", "--dtype", "float32", vocab_size=301)


@pytest.fixture(scope="session")
def few_words(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hf") / "few", vocab_size=9)


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def convert(source, target, *options) -> None:
    assert run(["convert", str(source), str(target), *map(str, options)]) == 0


def assert_is_reference(source, checkpoint, *, tp, llm, vit) -> None:
    wanted = reference_ranks(read(source), config_of(source), tp=tp, llm=llm, vit=vit)
    found = read_mcore(checkpoint)
    assert found.keys() == wanted.keys()
    for rank, parts in wanted.items():
        assert {key for key in found[rank] if key.startswith("model")} == parts.keys()
        for part, tensors in parts.items():
            assert_equal(found[rank][part], tensors)


GRID = [  # tp, pp, vp, options, language layers, vision layers
    (1, 1, 1, [], [[4]], [[2]]),
    (2, 1, 1, [], [[4]], [[2]]),
    (1, 2, 1, [], [[2, 2]], [[2, 0]]),
    (2, 2, 1, [], [[2, 2]], [[2, 0]]),
    (1, 2, 1, ["--first-stage-layers", 1], [[1, 3]], [[2, 0]]),
    (2, 2, 1, ["--first-stage-layers", 3], [[3, 1]], [[2, 0]]),
    (4, 2, 1, ["--first-stage-layers", 0], [[0, 4]], [[2, 0]]),  # TP > key/value heads
    (2, 2, 2, [], [[1, 1], [1, 1]], [[2, 0], [0, 0]]),
    (1, 2, 1, ["--pp-layers", "0,4", "--vit-pp-layers", "1,1"], [[0, 4]], [[1, 1]]),
    (2, 2, 2, ["--pp-layers", "[[0,1],[2,1]]", "--vit-pp-layers", "[[1,1],[0,0]]"],
     [[0, 1], [2, 1]], [[1, 1], [0, 0]]),
]


CASES = [(kind, *row) for kind in ("tied", "untied") for row in GRID]
CASES += [("odd_vocab", *GRID[3]), ("odd_vocab", *GRID[6])]  # 301 rows over 2 and 4 ranks
CASES += [("few_words", *GRID[6])]  # 9 rows over 4 ranks, of which the last has none


@pytest.mark.parametrize("kind, tp, pp, vp, options, llm, vit", CASES)
def test_a_checkpoint_is_the_reference_and_comes_back_bit_equal(
    kind, tp, pp, vp, options, llm, vit, request, tmp_path
):
    source = request.getfixturevalue(kind)
    layout = ["--tp", tp, "--pp", pp, "--vp", vp, *options]
    convert(source, tmp_path / "mcore", *layout)
    assert_is_reference(source, tmp_path / "mcore", tp=tp, llm=llm, vit=vit)
    convert(tmp_path / "mcore", tmp_path / "back")
    assert_equal(read(tmp_path / "back"), read(source))
    assert config_of(tmp_path / "back") == config_of(source)


@pytest.mark.parametrize("seed", range(12))
def test_any_layout_goes_to_any_other_and_back_to_the_same_tensors(seed, request, tmp_path):
    draw = random.Random(seed)
    source = request.getfixturevalue(draw.choice(["tied", "untied", "odd_vocab"]))

    def layout():
        tp, pp, vp = draw.choice([1, 2, 4]), draw.choice([1, 2, 3]), draw.choice([1, 2])
        vp = vp if pp > 1 else 1
        vit = [draw.randint(1, 2)] + [0] * (pp * vp - 1)
        if vit[0] == 1:
            vit[draw.randrange(1, pp * vp) if pp > 1 else 0] += 1
        last, llm = max(i for i, n in enumerate(vit) if n), [0] * (pp * vp)
        for _ in range(4):
            llm[draw.randint(last, pp * vp - 1)] += 1
        llm, vit = ([row[i * pp : (i + 1) * pp] for i in range(vp)] for row in (llm, vit))
        options = ["--tp", tp, "--pp", pp, "--vp", vp, "--pp-layers", json.dumps(llm),
                   "--vit-pp-layers", json.dumps(vit)]
        return options, {"tp": tp, "llm": llm, "vit": vit}

    (one, _), (two, described) = layout(), layout()
    convert(source, tmp_path / "one", *one)
    convert(tmp_path / "one", tmp_path / "two", *two)
    assert_is_reference(source, tmp_path / "two", **described)
    convert(tmp_path / "two", tmp_path / "back")
    assert_equal(read(tmp_path / "back"), read(source))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_cast_is_torchs_and_is_named_in_config_json(dtype, tied, tmp_path):
    convert(tied, tmp_path / "mcore", "--tp", 2, "--dtype", dtype)
    convert(tmp_path / "mcore", tmp_path / "back", "--to", "hf")
    wanted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in read(tied).items()}
    assert_equal(read(tmp_path / "back"), wanted)
    assert config_of(tmp_path / "back")["torch_dtype"] == dtype
    assert inspect_checkpoint(tmp_path / "mcore").dtype == dtype


def by_transformers_4_57(config: dict) -> dict:
    """As that release saves it: the language model's numbers once more in a table of their own."""
    own = ("architectures", "model_type", "torch_dtype", "tie_word_embeddings", "vision_config")
    rope = {"rope_type": "default", "type": "default",
            "mrope_section": config["rope_scaling"]["mrope_section"]}
    text = {key: value for key, value in config.items() if key not in own} | {"rope_scaling": rope}
    rest = {key: config[key] for key in ("architectures", "model_type")}
    vision = config["vision_config"] | {"model_type": "qwen2_vl"}
    return text | rest | {
        "dtype": config["torch_dtype"], "transformers_version": "4.57.6", "vision_config": vision,
        "text_config": text | {
            "model_type": "qwen2_vl_text", "dtype": config["torch_dtype"],
            "tie_word_embeddings": config["tie_word_embeddings"],
        },
    }


@pytest.mark.parametrize("form", [dict, by_transformers_4_57])
def test_config_json_comes_back_byte_for_byte_and_after_a_cast_but_for_the_dtype(
    form, tied, tmp_path
):
    source = shutil.copytree(tied, tmp_path / "source")
    text = json.dumps(form(config_of(tied)), indent=4)
    (source / "config.json").write_text(text)
    assert load_spec(source) == load_spec(tied)
    convert(source, tmp_path / "mcore", "--tp", 2)
    convert(tmp_path / "mcore", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_text() == text
    convert(tmp_path / "mcore", tmp_path / "cast", "--to", "hf", "--dtype", "float16")
    dtype = config_of(tied)["torch_dtype"]
    assert config_of(tmp_path / "cast") == json.loads(text.replace(f'"{dtype}"', '"float16"'))


def test_a_checkpoint_says_what_it_is_and_serves_each_rank(tied, tmp_path):
    convert(tied, tmp_path / "m", "--tp", 2, "--pp", 2, "--first-stage-layers", 1)
    info = inspect_checkpoint(tmp_path / "m")
    assert (info.format, info.iteration, info.release) == ("torch", 0, True)
    assert (info.layout.tp, info.layout.pp, info.layout.vp) == (2, 2, 1)
    assert (info.model_type, info.dtype) == ("qwen2_vl", "bfloat16")
    assert info.split.flat("llm") == [1, 3] and info.split.flat("vit") == [2, 0]
    assert inspect_checkpoint(info.path).split == info.split
    content = read_mcore(tmp_path / "m")["mp_rank_01_001"]
    assert isinstance(content["args"], argparse.Namespace)
    assert (content["checkpoint_version"], content["iteration"]) == (3.0, 0)
    assert content["args"].decoder_first_pipeline_num_layers == 1
    assert content["args"].tensor_model_parallel_size == 2
    assert_equal(load_rank(info, 1, 1)["model"], content["model"])
    latest = (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text()
    assert latest.strip() == "release"
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "merges.txt"):
        assert (tmp_path / "m" / name).read_bytes() == (tied / name).read_bytes()


def test_hf_output_is_sharded_with_an_index_that_fits(untied, tmp_path):
    convert(untied, tmp_path / "m", "--tp", 2)
    convert(tmp_path / "m", tmp_path / "back", "--max-shard-size", "200KB")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "back").glob("*.safetensors")}
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert all(name in files[file] for name, file in index["weight_map"].items())
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in files.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 200_000 or len(tensors) == 1
               for size, tensors in zip(sizes, files.values(), strict=True))
    assert_equal(read(tmp_path / "back"), read(untied))
    convert(tmp_path / "back", tmp_path / "again", "--tp", 2)
    convert(tmp_path / "again", tmp_path / "twice")
    assert_equal(read(tmp_path / "twice"), read(untied))


def copied(source, target, tensors=None):
    shutil.copytree(source, target)
    if tensors is not None:
        save_file({name: t.contiguous() for name, t in tensors.items()},
                  target / "model.safetensors")
    return target


def renamed(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.mark.parametrize("form", ["renamed", "bin", "old bin", "bin shards", "lm_head too"])
def test_other_forms_of_published_weights_are_read(form, tied, tmp_path):
    tensors, source = read(tied), copied(tied, tmp_path / "source")
    if form == "renamed":
        save_file({renamed(k): t for k, t in tensors.items()}, source / "model.safetensors")
    elif form == "lm_head too":
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
                  source / "model.safetensors")
    else:
        (source / "model.safetensors").unlink()
        old = {"_use_new_zipfile_serialization": form != "old bin"}
        if form == "bin shards":
            names = sorted(tensors)
            halves = {"a.bin": names[:20], "b.bin": names[20:]}
            index = {"weight_map": {n: file for file, some in halves.items() for n in some}}
            (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
            for file, some in halves.items():
                torch.save({n: tensors[n] for n in some}, source / file)
        else:
            transposed = tensors["model.layers.0.self_attn.o_proj.weight"].T.contiguous().T
            torch.save(tensors | {"model.layers.0.self_attn.o_proj.weight": transposed},
                       source / "pytorch_model.bin", **old)
    convert(source, tmp_path / "m", "--tp", 2, "--pp", 2)
    assert_is_reference(tied, tmp_path / "m", tp=2, llm=[[2, 2]], vit=[[2, 0]])


def test_a_wide_transposed_tensor_of_a_bin_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reshard, "BUFFER", 8)  # rows of the tiny model count as long
    source = make(tmp_path / "source")
    tensors = read(source)
    (source / "model.safetensors").unlink()
    torch.save({n: t.T.contiguous().T if t.dim() == 2 else t for n, t in tensors.items()},
               source / "pytorch_model.bin")
    convert(source, tmp_path / "m", "--tp", 2, "--pp", 2)
    convert(tmp_path / "m", tmp_path / "back")
    assert_equal(read(tmp_path / "back"), tensors)


class SomeToolsEnum:
    """What another tool's pickle may hold: an object whose class must not be run."""

    def __reduce__(self):
        return (print, ("PICKLED CODE RAN",))


def test_directories_of_other_tools_are_read_without_running_their_code(tied, tmp_path, capfd):
    convert(tied, tmp_path / "m", "--tp", 2)
    for rank in (0, 1):
        path = tmp_path / "m" / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        args = argparse.Namespace(**vars(content["args"]), kind=SomeToolsEnum())
        del args.megatron_vl
        content["args"] = args
        content["rng_state"] = [{"numpy": random.Random(0).getstate(), "odd": SomeToolsEnum()}]
        content["model"]["language_model.decoder.layers.0.mlp.linear_fc1._extra_state"] = None
        content["model"]["vision_model.decoder.layers.1.mlp._extra_state"] = torch.zeros(3)
        target = path.parent.with_name(f"mp_rank_{rank:02d}_000") / path.name
        target.parent.mkdir()
        torch.save(content, target)
        shutil.rmtree(path.parent)
    capfd.readouterr()
    convert(tmp_path / "m", tmp_path / "back")
    assert "PICKLED CODE RAN" not in capfd.readouterr().out
    assert_equal(read(tmp_path / "back"), read(tied))


@pytest.fixture(scope="session")
def torch_dist(tied, untied, tmp_path_factory):
    """One process writes both: megatron-core takes seconds to import."""
    out = tmp_path_factory.mktemp("dist")
    jobs = [f"{tied}:{out / 'tied'}:2:512", f"{untied}:{out / 'untied'}:1:384"]
    subprocess.run([sys.executable, str(ROOT / "tests" / "unit" / "write_torch_dist.py"), *jobs],
                   check=True, timeout=300, capture_output=True)
    return {"tied": out / "tied", "untied": out / "untied"}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_trained_torch_dist_checkpoint_goes_to_hf_and_to_any_layout(
    kind, torch_dist, request, tmp_path
):
    source = request.getfixturevalue(kind)
    info = inspect_checkpoint(torch_dist[kind])
    assert (info.format, info.iteration, info.release) == ("torch_dist", 7, False)
    assert info.model_type == "qwen2_vl" and info.split.flat("llm") == [4]
    convert(torch_dist[kind], tmp_path / "back", "--hf-config", source)
    assert_equal(read(tmp_path / "back"), read(source))
    convert(torch_dist[kind], tmp_path / "m", "--tp", 2, "--pp", 2)
    assert_is_reference(source, tmp_path / "m", tp=2, llm=[[2, 2]], vit=[[2, 0]])


def test_a_checkpoint_of_megatron_core_0_19_says_as_much_as_one_of_0_16(
    torch_dist, tied, tmp_path
):
    """It has no common.pt; layout, split, dtype and arguments are an object in a .distcp file."""
    old, new = (shutil.copytree(torch_dist["tied"], tmp_path / name) for name in ("old", "new"))
    as_of_0_18(old / "iter_0000007")
    as_of_0_19(new / "iter_0000007")
    info = inspect_checkpoint(new)
    assert info == replace(inspect_checkpoint(old), root=new, path=new / "iter_0000007")
    assert info.layout.tp == 2 and info.args == {"lr": 1e-4} and info.dtype
    convert(new, tmp_path / "back", "--hf-config", tied)
    assert_equal(read(tmp_path / "back"), read(tied))


WITHOUT_COMMON = {  # what is done to a checkpoint, and what is said
    "neither": (without_common, "has neither common.pt nor common_state/shard_0_1 in its "
                ".metadata, so its layout, arguments"),
    "another object": (lambda iteration: as_of_0_19(iteration, ["text"]),
                       "distcp does not say the checkpoint's arguments and layout"),
    "several": (lambda iteration: as_of_0_19(iteration, [{}, {}]),
                "distcp is broken at common_state/shard_0_1"),
    "cut off": (lambda iteration: os.truncate(max(as_of_0_19(iteration).glob("*.distcp")), 9),
                "distcp is missing or cut short"),
    "overwritten": (lambda iteration: overwrite_end(as_of_0_19(iteration)),
                    "distcp is broken at common_state/shard_0_1"),
}


def overwrite_end(iteration):
    with max(iteration.glob("*.distcp")).open("r+b") as file:
        file.seek(-400, 2)
        file.write(bytes(400))


@pytest.mark.parametrize("name", WITHOUT_COMMON)
def test_a_checkpoint_that_does_not_say_what_it_is_is_refused(name, torch_dist, tmp_path):
    change, what = WITHOUT_COMMON[name]
    root = shutil.copytree(torch_dist["tied"], tmp_path / "root")
    change(root / "iter_0000007")
    with pytest.raises(InputError) as caught:
        inspect_checkpoint(root)
    assert what in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["tied", "untied", "odd_vocab"])
def test_a_torch_dist_checkpoint_is_written_for_every_layout(kind, request, tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    source = request.getfixturevalue(kind)
    convert(source, tmp_path / "dist", "--format", "torch_dist", "--max-shard-size", "200KB")
    info = inspect_checkpoint(tmp_path / "dist")
    assert (info.format, info.release, info.iteration) == ("torch_dist", True, 0)
    assert len(list(info.path.glob("*.distcp"))) > 2
    # Torch's own reader finds what the files of one rank hold, layers stacked.
    dcp_to_torch_save(info.path, tmp_path / "read.pt")
    found = torch.load(tmp_path / "read.pt", weights_only=True)
    whole_model = dict(tp=1, llm=[[4]], vit=[[2]])
    (wanted,) = reference_ranks(read(source), config_of(source), **whole_model).values()
    for name, tensor in wanted["model"].items():
        if layer := re.search(r"\.layers\.(\d+)\.", name):
            whole = found[name.replace(layer[0], ".layers.")]
            assert len(whole) == (2 if name.startswith("vision") else 4)
            assert torch.equal(whole[int(layer[1])], tensor), name
        else:
            assert torch.equal(found.pop(name), tensor), name
    assert all(".layers." in name for name in found)
    convert(tmp_path / "dist", tmp_path / "m", "--tp", 2, "--pp", 2)
    assert_is_reference(source, tmp_path / "m", tp=2, llm=[[2, 2]], vit=[[2, 0]])
    convert(tmp_path / "m", tmp_path / "again", "--format", "torch_dist", "--verify")
    convert(tmp_path / "again", tmp_path / "back")
    assert_equal(read(tmp_path / "back"), read(source))


@pytest.mark.parametrize(("change", "says"), [
    (lambda table, at: setattr(table.storage_data[at], "relative_path", "../iter/__0_0.distcp"),
     "outside the checkpoint"),
    (lambda table, at: table.state_dict_metadata[at.fqn].chunks.append(
        table.state_dict_metadata[at.fqn].chunks[0]), "overlap"),
])
def test_a_hostile_table_of_contents_is_refused(change, says, torch_dist, tmp_path, capsys):
    import pickle

    shutil.copytree(torch_dist["tied"], tmp_path / "t")
    file = tmp_path / "t" / "iter_0000007" / ".metadata"
    table = pickle.loads(file.read_bytes())
    places = table.storage_data
    change(table, next(at for at in places if at.fqn.endswith("final_layernorm.weight")))
    file.write_bytes(pickle.dumps(table))
    assert run(["convert", str(tmp_path / "t"), str(tmp_path / "x")]) == 2
    assert says in capsys.readouterr().err


def test_a_torch_dist_table_of_contents_is_read_without_running_code(torch_dist, tmp_path, capfd):
    import pickle

    shutil.copytree(torch_dist["tied"], tmp_path / "t")
    (tmp_path / "t" / "iter_0000007" / ".metadata").write_bytes(pickle.dumps(SomeToolsEnum()))
    assert run(["convert", str(tmp_path / "t"), str(tmp_path / "x")]) == 2
    out = capfd.readouterr()
    assert "PICKLED CODE RAN" not in out.out and ".metadata" in out.err


def test_a_dry_run_prints_the_plan_with_totals_and_writes_nothing(tied, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tied / "config.json", bare)
    convert(bare, tmp_path / "m", "--tp", 2, "--pp", 2, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    convert(tied, tmp_path / "m", "--tp", 2, "--pp", 2)
    held = sum(t.nbytes for r in read_mcore(tmp_path / "m").values() for t in r["model"].values())
    assert lines[-1].startswith("total: 4 files") and lines[-1].endswith(f"{held:,} bytes")
    assert any("self_attn.q_proj.weight[0:32, 0:64]" in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "m"]


def test_converting_needs_no_torch_no_megatron_and_no_transformers(tied, tmp_path):
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'megatron', 'transformers', 'apex'):
            raise ImportError(f'{name} is blocked')
sys.meta_path.insert(0, Blocked())
from megatron_vl.cli.main import run
source, out = sys.argv[1:]
assert run(['convert', source, out + '/m', '--tp', '2', '--pp', '2']) == 0
assert run(['convert', out + '/m', out + '/back', '--verify']) == 0
assert run(['convert', out + '/m', out + '/half', '--to', 'hf', '--dtype', 'float16']) == 0
"""
    subprocess.run([sys.executable, "-c", code, str(tied), str(tmp_path)], check=True, cwd=ROOT,
                   timeout=120)
    assert_equal(read(tmp_path / "back"), read(tied))


# ---- a tower whose MLP another tool pads otherwise, or not at all ------------------------------


@pytest.fixture
def padded_to(window_model_dir, tmp_path, monkeypatch):
    """Writes the tiny model, whose MLP is 252 wide, with the width made a multiple of a number."""

    def write(multiple: int, *options: object):
        with monkeypatch.context() as patch:
            patch.setattr(tower_spec, "FFN_MULTIPLE", multiple)
            convert(window_model_dir, tmp_path / f"to-{multiple}", *options)
        return tmp_path / f"to-{multiple}"

    return write


@pytest.mark.parametrize("options", [("--tp", 2, "--pp", 2), ("--format", "torch_dist")])
def test_a_tower_that_was_not_padded_is_read(options, padded_to, window_model_dir, tmp_path):
    bare = padded_to(1, *options)
    if "--tp" in options:
        first = read_mcore(bare)["mp_rank_00_000"]["model"]
        assert first["vision_model.decoder.layers.0.mlp.linear_fc1.weight"].shape == (252, 64)
        assert first["vision_model.decoder.layers.0.mlp.linear_fc2.weight"].shape == (64, 126)
    convert(bare, tmp_path / "home", "--to", "hf")
    assert_equal(read(tmp_path / "home"), read(window_model_dir))
    convert(bare, tmp_path / "ours", "--tp", 4)
    convert(window_model_dir, tmp_path / "wanted", "--tp", 4)
    ours, wanted = read_mcore(tmp_path / "ours"), read_mcore(tmp_path / "wanted")
    assert ours.keys() == wanted.keys()
    for rank in wanted:
        assert_equal(ours[rank]["model"], wanted[rank]["model"])


@pytest.mark.parametrize("options", [("--tp", 2), ("--format", "torch_dist")])
def test_a_tower_of_another_width_is_refused_by_name(options, padded_to, tmp_path, capsys):
    assert run(["convert", str(padded_to(40, *options)), str(tmp_path / "home")]) == 2
    said = capsys.readouterr().err
    assert re.search(r"vision_model\.decoder\.layers\S*linear_fc1\.weight has shape", said), said
