"""`train --dry-run`: what it says, what it refuses, and that it touches nothing."""

from __future__ import annotations

import re
import shutil
import sys

import pytest
from commands import run
from safetensors.torch import load_file, save_file
from true_sizes import PARAMETERS, write

from megatron_vl.cli.main import run as command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hf") / "2B", "2B")


def said(capsys, model, *words: object, code: int = 0) -> str:
    """What a dry run prints: its tables, or the one sentence of a refusal."""
    known = ["train", "--dry-run", "--hf-config", model, "--nproc-per-node", 2]
    if "--use-distributed-optimizer" not in words:
        words = ("--no-use-distributed-optimizer", *words)
    for option, value in (("--train-data-path", "nowhere/wds"), ("--global-batch-size", 2)):
        known += [option, value] if option not in words else []
    assert command([str(word) for word in (*known, *words)]) == code
    out, err = capsys.readouterr()
    assert not (out if code else err)
    return err if code else out


def numbers(text: str, stage: int = 0) -> list[int]:
    """Of the stage's row: parameters, weights, gradients, optimizer, together."""
    row = re.search(rf"^stage {stage} +(.*)$", text, re.M)[1].split()
    return [int(number.replace(",", "")) for number in row if "." not in number]


GPU_ONLY = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "transformers", "transformer_engine"):
            raise ImportError(name + " must not be imported here")
sys.meta_path.insert(0, Blocked())
from megatron_vl.cli.main import main
main(sys.argv[1:])
"""


def test_it_needs_neither_torch_nor_megatron_core_nor_a_node_rank(tmp_path):
    model = write(tmp_path / "72B", "72B")
    before = sorted(tmp_path.rglob("*"))
    done = run([sys.executable, "-c", GPU_ONLY, "train", "--dry-run", "--hf-config", model,
                "--train-data-path", tmp_path / "wds", "--save", tmp_path / "out",
                "--tensor-model-parallel-size", 8, "--pipeline-model-parallel-size", 4,
                "--nnodes", 4, "--nproc-per-node", 8, "--bf16", "--use-distributed-optimizer"],
               timeout=20)
    assert done.code == 0, done.err
    assert f"the model has {PARAMETERS['qwen2_vl']['72B']:,} parameters; TP 8 x PP 4" in done.out
    assert "32 processes = 4 nodes x 8" in done.out
    assert "[7392, 8192]      20" in done.out  # gate and up of 29568 over 8 ranks, 20 layers
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("words", "per_weight"), [
    (["--fp32"], (4, 4, 8)),  # weights, gradients, two moments
    ([], (2, 4, 12)),  # config.json's, bf16
    (["--bf16"], (2, 4, 12)),  # and the weights in fp32
    (["--fp16"], (2, 4, 12)),
])
def test_bytes_follow_the_precision(capsys, model, words, per_weight):
    weights, *nbytes, together = numbers(said(capsys, model, *words))
    assert weights == PARAMETERS["qwen2_vl"]["2B"]
    assert nbytes == [weights * one for one in per_weight] and together == sum(nbytes)


def test_what_is_frozen_has_weights_alone(capsys, model):
    text = said(capsys, model, "--bf16", "--freeze-llm")
    weights, kept, gradients, optimizer, _ = numbers(text)
    llm = 1_543_714_304  # of Qwen2-VL 2B's language model, embedding and head in one
    assert (kept, gradients, optimizer) == (2 * weights, 4 * (weights - llm), 12 * (weights - llm))
    assert "frozen: llm" in text and re.search(r"word_embeddings.weight .* frozen$", text, re.M)
    assert not re.search(r"patch_embed.* frozen$", text, re.M)


def test_the_distributed_optimizer_shares_its_state(capsys, model):
    alone = numbers(said(capsys, model, "--bf16"))
    shared = numbers(said(capsys, model, "--bf16", "--use-distributed-optimizer"))
    assert alone[3] / 2 <= shared[3] < alone[3] / 2 * 1.0001
    cp = numbers(said(capsys, model, "--bf16", "--use-distributed-optimizer",
                      "--context-parallel-size", 2))
    assert cp == shared, "context ranks share it as data ranks do"


def test_an_offloaded_optimizer_is_in_host_memory(capsys, model):
    words = ["--bf16", "--use-distributed-optimizer"]
    device = numbers(said(capsys, model, *words))[3]
    text = said(capsys, model, *words, "--optimizer-cpu-offload",
                "--optimizer-offload-fraction", 0.75)
    *_, optimizer, together, host = numbers(text)
    assert "optimizer 75% in host memory" in text and "in host memory\n" in text
    assert optimizer == round(device / 4)
    assert host == round((device + device / 3) * 0.75), "with a copy of the gradients"
    assert together == sum(numbers(text)[1:4])


def test_a_tied_embedding_is_told_of_twice_over_stages(capsys, model):
    text = said(capsys, model, "--pipeline-model-parallel-size", 2)
    assert f"{PARAMETERS['qwen2_vl']['2B']:,} + {151936 * 1536:,} tied embedding again" in text
    text = said(capsys, model, "--pipeline-model-parallel-size", 2,
                "--num-virtual-stages-per-pipeline-rank", 2)
    assert re.search(r"^1 +1 +1 +- +21-27 +last norm, head$", text, re.M)


def test_a_whole_vision_tower_is_counted_on_every_rank(capsys, model):
    text = said(capsys, model, "--tensor-model-parallel-size", 2, "--vit-data-parallel")
    assert "[3840, 1280]" in text and "[1024, 1536]" in text
    assert "replicated over TP" in text


def test_what_is_not_there_yet_is_a_note(capsys, model, tmp_path):
    (tmp_path / "file").touch()
    text = said(capsys, model, "--load", tmp_path / "mcore", "--save", tmp_path / "file" / "out")
    assert f"note: load {tmp_path / 'mcore'} is not there yet" in text
    assert "note: the dataset nowhere/wds is not there yet." in text
    assert f"on this machine it would be refused: save {tmp_path / 'file' / 'out'} cannot" in text


def test_what_only_this_machine_lacks_is_a_note(capsys, model):
    import torch

    text = said(capsys, model, "--bf16", "--fp8-format", "hybrid")
    if not torch.cuda.is_available():
        assert "note: on this machine it would be refused: fp8-format needs" in text


@pytest.mark.parametrize(("words", "sentence"), [
    (["--tensor-model-parallel-size", 3], "2 processes cannot hold tp 3"),
    (["--tensor-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 12],
     "--decoder-first-pipeline-num-layers is 12 but with pp 1"),
    (["--global-batch-size", 3], "is not a multiple of"),
    (["--model-size", "7B"], "model-size is 7B"),
    (["--cpu-offloading", "--pipeline-model-parallel-size", 2], "needs a pipeline of one stage"),
    (["--train-data-path", "a,0.3,b"], "mixes weights and paths"),
])
def test_what_no_machine_could_run_is_refused(capsys, model, words, sentence):
    assert sentence in said(capsys, model, *words, code=2)


def test_a_dataset_that_is_there_is_checked(capsys, model, tmp_path):
    (tmp_path / "wds").mkdir()
    text = said(capsys, model, "--train-data-path", tmp_path / "wds", code=2)
    assert "has no .nv-meta" in text


def test_without_config_json_it_says_what_to_give(capsys, tmp_path):
    words = ["train", "--dry-run", "--nproc-per-node", "1", "--train-data-path", "x", "--load"]
    assert command([*words, str(tmp_path / "none")]) == 2
    assert "give --hf-config a directory" in capsys.readouterr().err


def test_weights_are_looked_at_whatever_they_were_split_for(capsys, model_dir, tmp_path):
    assert command(["convert", str(model_dir), str(tmp_path / "m"), "--pp", "2"]) == 0
    capsys.readouterr()
    words = ("--load", tmp_path / "m", "--pipeline-model-parallel-size", 2)
    fits = said(capsys, model_dir, *words)
    assert f"weights come from {tmp_path / 'm' / 'release'}" in fits and "llm 2-2" in fits
    assert "llm 1-3" in said(capsys, model_dir, *words, "--decoder-first-pipeline-num-layers", 1)
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    weights = load_file(other / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    refused = said(capsys, model_dir, "--load", other, code=2)
    assert "1 published key(s) are missing: model.norm.weight" in refused
