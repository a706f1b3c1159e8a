"""A directory that is no checkpoint, or not of the kind wanted, is told what it is."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from commands import megatron_vl

from megatron_vl.errors import InputError
from megatron_vl.models import load_spec
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.paths import check_outputs
from megatron_vl.weights.found import no_checkpoint, others


@pytest.fixture(scope="module")
def places(tmp_path_factory, hf_dir):
    """One directory of every kind."""
    root = tmp_path_factory.mktemp("places")
    shutil.copytree(hf_dir, root / "hf")
    done = megatron_vl("convert", root / "hf", root / "mcore")
    assert done.code == 0, done.text
    shutil.copytree(root / "mcore", root / "runs" / "tuned" / "checkpoint")
    shutil.copytree(root / "hf", root / "models" / "tiny")
    for name in ("config only", "empty", "adapter", "dataset/.nv-meta"):
        (root / name).mkdir(parents=True)
    shutil.copy(hf_dir / "config.json", root / "config only")
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (root / "file.json").write_text("{}")
    return root


# directory -> what is said where a Megatron-Core checkpoint is wanted, and where Hugging Face is;
# None: it is one. ROOT stands for the places' own directory.
SAID = {
    "hf": ("is a Hugging Face directory; give a Megatron-Core checkpoint; megatron-vl convert "
           "ROOT/hf CHECKPOINT --tp TP --pp PP makes one of it", None),
    "mcore": (None, "is a Megatron-Core checkpoint; give a Hugging Face directory with weights; "
                    "megatron-vl convert ROOT/mcore HF_DIR makes one of it"),
    "mcore/release": (None, "megatron-vl convert ROOT/mcore/release HF_DIR makes one of it"),
    "mcore/release/mp_rank_00": (
        "is one rank's part of a Megatron-Core checkpoint; give ROOT/mcore",) * 2,
    "runs": ("holds checkpoints in folders of its own; give one of them: "
             "ROOT/runs/tuned/checkpoint", "is no checkpoint"),
    "models": ("is no checkpoint", "give one of them: ROOT/models/tiny"),
    "config only": ("has a config.json but no weights", "has a config.json but no weights"),
    "empty": ("is no checkpoint: it has neither",) * 2,
    "adapter": ("is a LoRA adapter, without the weights it belongs to; merge it",) * 2,
    "dataset": ("is a prepared dataset",) * 2,
    "file.json": ("is a file; give a",) * 2,
    "nowhere": ("does not exist",) * 2,
}


@pytest.mark.parametrize(("name", "wanted", "said"), [
    (name, wanted, one) for name, pair in SAID.items()
    for wanted, one in zip(("mcore", "hf"), pair, strict=True) if one is not None
])
def test_a_directory_is_told_what_it_is(name, wanted, said, places):
    message = str(no_checkpoint(places / name, wanted))
    assert message.startswith(f"{places / name} ")
    assert said.replace("ROOT", str(places)) in message


NO_CONFIG = {  # where the model's directory is wanted
    "mcore/release": "is one iteration of the checkpoint ROOT/mcore; give ROOT/mcore.",
    "runs": "holds checkpoints in folders of its own; give one of them: ROOT/runs/tuned/checkpoint",
    "adapter": "is a LoRA adapter, without the weights it belongs to; merge it",
    "dataset": "is a prepared dataset; give",
    "empty": "has no config.json; give a directory that has the model's own one",
}


@pytest.mark.parametrize("name", NO_CONFIG)
def test_a_directory_without_a_model_is_told_what_it_is(name, places):
    with pytest.raises(InputError) as told:
        load_spec(places / name)
    assert NO_CONFIG[name].replace("ROOT", str(places)) in str(told.value)


@pytest.mark.parametrize(("name", "what"), [
    ("hf", "a Hugging Face directory with weights"), ("dataset", "a prepared dataset"),
    ("mcore", None), ("config only", None), ("empty", None), ("nowhere", None),
])
def test_no_run_writes_into_what_is_others(name, what, places):
    assert others(places / name) == what


def test_training_refuses_to_save_into_a_dataset(places, hf_dir, wds_dir):
    save = places / "dataset"
    before = sorted(save.rglob("*"))
    done = megatron_vl("train", "--hf-config", hf_dir, "--train-data-path", wds_dir, "--save", save)
    said = f"--save {save} is a prepared dataset; give a directory of the run's own.\n"
    assert (done.code, done.err) == (2, f"megatron-vl train: {said}"), done.text
    assert sorted(save.rglob("*")) == before


EXPORTS = {  # SAVE, what else is given -> what is said of SAVE/hf
    ".": ({"load": "hf"}, "the export replaces ROOT/hf, which load reads; give another save."),
    "notes": ({}, "the export writes ROOT/notes/hf, where something else is; move that away"),
    "exported": ({"load": "hf"}, None),
}


@pytest.mark.parametrize("save", EXPORTS)
def test_an_export_replaces_nothing_else_and_no_model_that_is_read(save, places):
    more, said = EXPORTS[save]
    (places / "notes" / "hf" / "more").mkdir(parents=True, exist_ok=True)
    if save == "exported":
        shutil.copytree(places / "hf", places / "exported" / "hf")
    config = TrainConfig.from_dict({
        "save": str(places / save), "export_hf": True,
        **{name: str(places / value) for name, value in more.items()},
    })
    if said is None:
        return check_outputs(config)
    with pytest.raises(InputError) as told:
        check_outputs(config)
    assert said.replace("ROOT", str(places)) in str(told.value)


COMMANDS = {  # command, and what it is given that it cannot use
    "convert": (["convert", "P", "T"], "empty"),
    "verify": (["verify", "P", "P"], "adapter"),
    "parity": (["parity", "P"], "mcore"),
    "chat": (["chat", "P", "a?"], "adapter"),
    "evaluate": (["evaluate", "P", "D", "--limit", "1"], "dataset"),
    "train": (["train", "--load", "P", "--hf-config", "H", "--train-data-path", "D"], "dataset"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_it_at_once_and_leaves_nothing(command, places, wds_dir, tmp_path):
    words, name = COMMANDS[command]
    known = {"P": places / name, "T": tmp_path / "target", "H": places / "hf", "D": wds_dir}
    started = time.monotonic()
    done = megatron_vl(*(known.get(word, word) for word in words))
    assert time.monotonic() - started < 30
    assert done.code == 2 and f"megatron-vl {command}: {places / name} is " in done.err, done.text
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert not any(tmp_path.iterdir())
