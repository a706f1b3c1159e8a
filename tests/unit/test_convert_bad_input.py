"""What is wrong is said in one sentence, with exit code 2, and nothing is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from tiny_hf import ROOT, assert_equal, make, read

from megatron_vl.cli.main import run
from megatron_vl.weights import files, reshard


@pytest.fixture(scope="session")
def hf(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="session")
def mcore(hf, tmp_path_factory):
    target = tmp_path_factory.mktemp("mcore") / "m"
    assert run(["convert", str(hf), str(target), "--tp", "2", "--pp", "2"]) == 0
    return target


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command, expects code 2, one line that matches, and no new files."""

    def check(source, *options, says, target="out"):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert run(["convert", str(source), str(tmp_path / target), *options]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("megatron-vl convert: "), lines
        for words in [says] if isinstance(says, str) else says:
            assert words in lines[0], lines[0]
        assert sorted(tmp_path.rglob("*")) == before

    return check


def changed(hf, tmp_path, change) -> object:
    """A copy of the checkpoint with `change(tensors)` applied."""
    source = tmp_path / "source"
    shutil.copytree(hf, source)
    tensors = read(source)
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    return source


FILES = {
    "tokenizer.json": ["tokenizer.json"],
    "preprocessor_config.json": ["preprocessor_config.json"],
    "all": ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"],
}


@pytest.mark.parametrize("missing", FILES.values(), ids=FILES)
def test_a_model_without_tokenizer_or_processor_is_converted_with_a_warning_and_not_trained(
    missing, hf, tmp_path, capsys
):
    source = shutil.copytree(hf, tmp_path / "source")
    for name in missing:
        (source / name).unlink()
    assert run(["convert", str(hf), str(tmp_path / "whole")]) == 0
    assert not capsys.readouterr().err
    target = tmp_path / "out"
    assert run(["convert", str(source), str(target)]) == 0
    assert f"has no {' and no '.join(missing)}, without which" in capsys.readouterr().err
    words = ["train", "--load", str(target), "--train-data-path", "x", "--nproc-per-node", "1"]
    assert run(words) == 2  # before any process is started
    said = capsys.readouterr().err
    assert f"{target} has no {' and no '.join(missing)}, which training reads" in said
    assert run([*words, "--dry-run"]) == 0
    assert f"would be refused: {target} has no {missing[0]}" in capsys.readouterr().out


@pytest.mark.parametrize("options, says", [
    (["--tp", "3"], "TP 3 does not divide the model's 4 attention heads"),
    (["--tp", "0"], "tp is 0"),
    (["--pp", "3"], "set first-stage-layers"),
    (["--pp", "4", "--first-stage-layers", "2"], "first-stage-layers 2 leaves 2 of 4"),
    (["--pp", "2", "--first-stage-layers", "9"], "between 0 and 4"),
    (["--vp", "2"], "vp 2 needs a pipeline"),
    (["--pp", "2", "--pp-layers", "1,2"], "sums to 3"),
    (["--pp", "2", "--pp-layers", "one,two"], "write 1,10,10,7"),
    (["--pp", "2", "--pp-layers", "2,2", "--vit-pp-layers", "1,1"], "vision tower must end"),
    (["--model-size", "2B"], "use auto"),
    (["--model-size", "3B"], "one of 2B, 7B, 72B or auto"),
    (["--to", "hf", "--tp", "2"], "--tp is for a Megatron-Core DST"),
    (["--to", "hf", "--format", "torch"], "--format is for a Megatron-Core DST"),
    (["--format", "torch_dist", "--pp", "2"], "--pp is for --format torch"),
    (["--to", "hf", "--max-shard-size", "big"], "write 5GB or 500MB"),
    (["--workers", "0"], "--workers is 0; it must be at least 1"),
])
def test_arguments_that_do_not_fit_the_model(options, says, hf, refused):
    refused(hf, *options, says=says)


def test_sources_that_are_no_checkpoint(tmp_path, refused):
    refused(tmp_path / "none", says="none does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", says="is no checkpoint")


def test_an_unknown_extra_key(hf, tmp_path, refused):
    source = changed(hf, tmp_path, lambda t: t.update({"visual.extra.weight": torch.ones(2)}))
    refused(source, says=["unmapped: visual.extra.weight", "models/qwen2_vl/weight_map.py"])


def test_a_missing_key(hf, tmp_path, refused):
    source = changed(hf, tmp_path, lambda t: t.pop("visual.blocks.1.attn.qkv.bias"))
    refused(source, says="missing: visual.blocks.1.attn.qkv.bias")


def test_a_wrong_shape(hf, tmp_path, refused):
    source = changed(hf, tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(63)}))
    refused(source, says=["model.norm.weight has shape [63]", "[64]"])


def test_an_lm_head_that_differs_from_the_embedding_it_is_tied_to(hf, tmp_path, refused):
    source = changed(hf, tmp_path, lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    refused(source, says=["model.embed_tokens.weight is stored twice", "lm_head.weight"])


def test_mixed_dtypes_need_a_cast(hf, tmp_path, refused):
    name = "model.layers.0.self_attn.k_proj.weight"
    source = changed(hf, tmp_path, lambda t: t.update({name: t[name].float()}))
    refused(source, says="pass --dtype")
    assert run(["convert", str(source), str(tmp_path / "out"), "--dtype", "float32"]) == 0


def test_nan_and_infinity_are_reported(hf, tmp_path, capsys):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = float("nan")

    source = changed(hf, tmp_path, spoil)
    assert run(["convert", str(source), str(tmp_path / "out")]) == 0
    assert "1 NaN or Inf in 1 tensor(s): language_model.decoder.final" in capsys.readouterr().out


def truncate(path):
    os.truncate(path, path.stat().st_size - 100)


def lie(path):
    """Two tensors claim the same bytes, file and header lengths unchanged."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    one, two = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    header[two]["data_offsets"] = header[one]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(raw[:8] + text.ljust(length) + raw[8 + length :])


def repeat_key(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip()
    entry = b',"model.norm.weight":{"dtype":"BF16","shape":[64],"data_offsets":[0,128]}}'
    text = text[:-1] + entry
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize("spoil, says", [
    (truncate, "its header asks for"),
    (lie, "a wrong place"),
    (repeat_key, "model.norm.weight appears twice"),
    (lambda path: path.write_bytes(b""), "header does not fit"),
    (lambda path: path.write_bytes(b"\xff" * 64), "header does not fit"),
    (lambda path: path.write_bytes((8).to_bytes(8, "little") + b"not json"), "unreadable"),
])
def test_a_broken_safetensors_file(spoil, says, hf, tmp_path, refused):
    shutil.copytree(hf, tmp_path / "source")
    spoil(tmp_path / "source" / "model.safetensors")
    refused(tmp_path / "source", says=["model.safetensors", says, "copy or download it again"])


def test_a_missing_shard_a_broken_index_and_a_key_in_two_shards(hf, tmp_path, refused):
    source = tmp_path / "source"
    assert run(["convert", str(hf), str(source), "--to", "hf", "--max-shard-size", "100KB"]) == 0
    shards = sorted(source.glob("*.safetensors"))
    shards[1].rename(tmp_path / "kept")
    refused(source, says=["lacks", shards[1].name])
    shutil.copy(shards[0], shards[1])
    refused(source, says="and again in")
    (source / "model.safetensors.index.json").write_text("{}")
    refused(source, says="weight_map is")


def test_a_broken_bin_file(hf, tmp_path, refused):
    shutil.copytree(hf, tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    path = tmp_path / "source" / "pytorch_model.bin"
    torch.save(read(hf), path)
    truncate(path)
    refused(tmp_path / "source", says="pytorch_model.bin cannot be read")


def test_a_megatron_checkpoint_that_is_not_whole(mcore, tmp_path, refused):
    source = tmp_path / "source"
    shutil.copytree(mcore, source)
    latest = source / "latest_checkpointed_iteration.txt"
    latest.write_text("100")
    refused(source, says="has release; write one of these")
    latest.write_text("newest")
    refused(source, says="says 'newest' but")
    latest.write_text("release")
    rank = source / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    kept = rank.read_bytes()
    rank.unlink()
    refused(source, says=["lacks", "mp_rank_01_001/model_optim_rng.pt"])
    rank.write_bytes(kept[:-50])
    refused(source, says="cannot be read as a torch file")
    content = torch.load(mcore / "release" / "mp_rank_01_001" / rank.name, weights_only=False)
    gone = content["model"].pop("language_model.decoder.final_layernorm.weight")
    torch.save(content, rank)
    refused(source, says="missing: mp_rank_01_001/model_optim_rng.pt:model:language_model.decoder")
    content["model"]["language_model.decoder.final_layernorm.weight"] = gone + 1
    torch.save(content, rank)
    refused(source, says="the copies differ")


def test_a_config_json_of_another_model(mcore, tmp_path, refused):
    other = make(tmp_path / "other", "--ffn-size", "128")
    refused(mcore, "--hf-config", str(other), says=["has shape", "config.json"])
    shutil.copytree(mcore, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    refused(tmp_path / "bare", says="--hf-config")


def test_an_existing_target_is_kept_unless_overwriting_is_asked_for(hf, tmp_path, refused):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    refused(hf, says=["exists and is not empty", "--overwrite"])
    refused(hf, "--overwrite", says=["out holds no checkpoint", "remove it yourself"])
    (tmp_path / "file").write_text("x")
    refused(hf, says="is a file", target="file")
    shutil.copy(hf / "config.json", target)
    assert run(["convert", str(hf), str(target), "--overwrite"]) == 0
    assert not (target / "precious").exists() and (target / "release").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


@pytest.mark.parametrize("source, target", [
    ("all/m", "all/m"), ("all/m", "all/m/release"), ("all/m", "all"), ("all/m", "link"),
    ("link", "all/m"), ("other", "all"),
])
def test_a_target_that_holds_what_is_read_is_refused(source, target, hf, mcore, tmp_path, refused):
    shutil.copytree(mcore, tmp_path / "all" / "m")
    shutil.copytree(mcore, tmp_path / "other")
    shutil.copytree(hf, tmp_path / "all", dirs_exist_ok=True)
    (tmp_path / "link").symlink_to("all/m")
    refused(tmp_path / source, "--tp", "2", "--hf-config", str(tmp_path / "all"), "--overwrite",
            says=["holds", "which is in use"], target=target)


def test_a_linked_target_is_replaced_where_it_lies(hf, mcore, tmp_path):
    shutil.copytree(mcore, tmp_path / "far")
    (tmp_path / "out").symlink_to("far")
    assert run(["convert", str(hf), str(tmp_path / "out"), "--overwrite"]) == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "far/release/mp_rank_00").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "out"]


def test_a_full_disk_is_said_before_anything_is_written(hf, refused, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(hf, says=["1,000 bytes free", "are needed"])


def test_a_disk_that_fills_up_while_writing_leaves_nothing(hf, refused, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.TensorAt, "write", full)
    refused(hf, says=["No space left on device", "free space"])


def mounted(tmp_path, options: str, *words) -> subprocess.CompletedProcess:
    """A conversion into a file system of its own, and what it leaves there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
mount -t tmpfs -o size=4m none {disk} || exit 77
mount -o remount,{options} {disk} || exit 77
{sys.executable} -m megatron_vl convert "$@" {disk}/out; code=$?
ls -A {disk}; exit $code
"""
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "-"]
    done = subprocess.run([*alone, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount")
    return done


@pytest.mark.parametrize(("options", "says"), [
    ("size=100k", ["bytes free but", "are needed"]),  # too small for the weights
    ("size=500k", ["No space left on device", "free space"]),  # for what goes along with them
    ("ro", ["Read-only file system", "choose another directory"]),
])
def test_a_real_disk_that_is_full_or_read_only_is_said_and_nothing_left(
    options, says, hf, tmp_path
):
    done = mounted(tmp_path, options, hf)
    assert done.returncode == 2, done.stderr
    assert all(one in done.stderr for one in says), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout.strip()


def test_a_run_killed_at_any_moment_leaves_the_old_target_and_can_be_repeated(hf, tmp_path):
    target = tmp_path / "out"
    assert run(["convert", str(hf), str(target), "--tp", "2"]) == 0
    before = {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    code = """
import sys, time
from megatron_vl.weights import files
def slow(*_):
    sys.stdout.write('writing\\n')  # one call: two threads' lines must not mix
    sys.stdout.flush()
    time.sleep(60)
files.TensorAt.write = slow
from megatron_vl.cli.main import run
run(['convert', sys.argv[1], sys.argv[2], '--overwrite'])
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(hf), str(target)], cwd=ROOT,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    assert any(path.name.startswith(".out.partial-") for path in tmp_path.iterdir())
    after = {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert after == before
    assert run(["convert", str(target), str(tmp_path / "back")]) == 0
    assert_equal(read(tmp_path / "back"), read(hf))
    assert run(["convert", str(hf), str(target), "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_run_killed_while_it_swaps_is_mended_by_the_next(renames, hf, tmp_path):
    target = tmp_path / "out"
    assert run(["convert", str(hf), str(target), "--tp", "2"]) == 0
    code = """
import os, signal, sys
from pathlib import Path
left, rename = int(sys.argv[3]), Path.rename
def renames(*paths):
    global left
    rename(*paths)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = renames
from megatron_vl.cli.main import run
run(['convert', sys.argv[1], sys.argv[2], '--overwrite'])
"""
    killed = subprocess.run([sys.executable, "-c", code, str(hf), str(target), str(renames)],
                            cwd=ROOT, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert target.exists() == (renames == 2)
    assert any(path.name.startswith(".out.replaced-") for path in tmp_path.iterdir())
    assert run(["convert", str(hf), str(target), "--tp", "4"]) == 2  # it exists, as before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    ranks = {1: ["mp_rank_00", "mp_rank_01"], 2: ["mp_rank_00"]}[renames]
    assert sorted(path.name for path in (target / "release").iterdir()) == ranks


@pytest.mark.parametrize("buffer", [1, 64, 10**6])
def test_large_tensors_go_through_in_small_chunks(buffer, hf, mcore, tmp_path, monkeypatch):
    monkeypatch.setattr(reshard, "CHUNK", 700)
    monkeypatch.setattr(reshard, "SPAN", 3000)
    monkeypatch.setattr(reshard, "BUFFER", buffer)  # written piece by piece, some, or joined
    assert run(["convert", str(mcore), str(tmp_path / "m"), "--tp", "4"]) == 0
    assert run(["convert", str(tmp_path / "m"), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert_equal(read(tmp_path / "back"), read(hf))
