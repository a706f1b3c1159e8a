"""Options, their files and flags; the numbers a run writes and draws."""

from __future__ import annotations

import argparse
import faulthandler
from dataclasses import MISSING, fields
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from megatron_vl.data.load.config import DataConfig
from megatron_vl.errors import InputError
from megatron_vl.parallel.stages import layer_list
from megatron_vl.training import microbatches
from megatron_vl.training.options.bounds import BOUNDS
from megatron_vl.training.options.config import TrainConfig, kind_of
from megatron_vl.training.options.config_sources import add_arguments, load_config
from megatron_vl.training.options.groups import GROUPS


def from_flags(*words: str, yaml_file=None) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return load_config(vars(parser.parse_args(words)), yaml_file)


def test_every_option_survives_the_way_through_a_dictionary():
    config = from_flags("--lr", "3e-4", "--bf16", "--train-data-path", "there")
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.optimizer.lr == 3e-4 and config.model.dtype == "bfloat16"


def test_flags_beat_the_file_and_the_file_beats_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train-iters: 7\nlr: 0.001\nsequence_parallel: true\n")
    config = from_flags("--train-iters", "9", yaml_file=str(file))
    assert config.batch.train_iters == 9 and config.optimizer.lr == 1e-3
    assert config.parallel.sequence_parallel and config.optimizer.clip_grad == 1.0


def test_variables_beat_the_file_and_flags_beat_variables(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text("train-iters: 7\nlr: 0.001\nbf16: true\n")
    for name, value in (("LR", "3e-4"), ("TRAIN_ITERS", "8"), ("BF16", "false"),
                        ("TRAIN_DATA_PATH", "0.3,a: b,0.7,c"), ("SAVE", "")):
        monkeypatch.setenv(f"MEGATRON_VL_{name}", value)
    config = from_flags("--train-iters", "9", yaml_file=str(file))
    assert config.optimizer.lr == 3e-4 and config.batch.train_iters == 9 and not config.model.bf16
    assert config.data.train_data_path == "0.3,a: b,0.7,c" and config.checkpoint.save is None


@pytest.mark.parametrize(("name", "value", "sentence"), [
    ("TRAIN_ITER", "8", "MEGATRON_VL_TRAIN_ITER is no option's; did you mean "
     "MEGATRON_VL_TRAIN_ITERS"),
    ("ZZZ", "8", "MEGATRON_VL_ZZZ is no option's; unset it"),
    ("LR", "[", "MEGATRON_VL_LR is '\\['"),
    ("LR", "fast", "MEGATRON_VL_LR is 'fast'; give a number"),
])
def test_a_variable_that_is_no_option_is_refused(name, value, sentence, monkeypatch):
    monkeypatch.setenv(f"MEGATRON_VL_{name}", value)
    with pytest.raises(InputError, match=sentence):
        from_flags()


def test_a_flag_switches_off_what_the_file_switches_on(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("bf16: true\noverlap-grad-reduce: true\nno-load-rng: true\n")
    config = from_flags("--no-bf16", "--no-load-optim", yaml_file=str(file))
    assert config.model.dtype == "float32" and config.optimizer.overlap_grad_reduce
    assert config.checkpoint.no_load_optim and config.checkpoint.no_load_rng
    with pytest.raises(SystemExit):
        from_flags("--no-no-load-rng")


@pytest.mark.parametrize("text", ["profile-ranks: 3", "profile-ranks: [0, 2]", "{}"])
def test_one_or_several_values_are_given_alike_everywhere(text, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    known = {"profile-ranks: 3": (3,), "profile-ranks: [0, 2]": (0, 2), "{}": (0,)}[text]
    config = from_flags(yaml_file=str(tmp_path / "run.yaml"))
    assert config.log.profile_ranks == known
    words = ["--profile-ranks", *map(str, known)]
    assert from_flags(*words).log.profile_ranks == known
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert from_flags(yaml_file=str(tmp_path / "again.yaml")) == config


def test_the_schedule_lasts_as_long_as_the_run_unless_told():
    assert from_flags("--train-iters", "7").decay_iters == 7
    assert from_flags("--train-iters", "7", "--lr-decay-iters", "5").decay_iters == 5


def test_options_wired_to_collectives_and_the_scheduler_have_their_defaults():
    config = from_flags()
    assert config.parallel.distributed_timeout_minutes == 10
    assert not config.optimizer.override_opt_param_scheduler
    config = from_flags("--distributed-timeout-minutes", "0.5", "--override-opt-param-scheduler")
    assert config.parallel.distributed_timeout_minutes == 0.5
    assert config.optimizer.override_opt_param_scheduler


OUT_OF_RANGE = {
    "must be at least 0": [
        "lr-warmup-iters: -1", "weight-decay: -0.1", "clip-grad: -1", "clip-grad: .nan",
        "seed: -1", "num-workers: -1", "packing-buffer-size: -1", "shuffle-buffer-size: -1",
        "eval-interval: -1", "eval-iters: -1", "adam-beta1: -0.1", "vit-lr: -1", "merger-lr: -1",
    ],
    "must be at least 1": [
        "lr-decay-iters: 0", "train-iters: 0", "save-interval: 0", "max-samples-per-sequence: 0",
        "recompute-num-layers: 0", "vit-recompute-num-layers: 0", "cpu-offloading-num-layers: 0",
        "min-offloaded-tensor-size: 0",
        "log-interval: 0", "profile-step-start: 0",
    ],
    "must be at least 0.01": ["distributed-timeout-minutes: 0"],
    "less than 1": ["adam-beta1: 1", "adam-beta2: 1.5", "adam-beta2: .nan"],
    "must be above 0": ["adam-eps: 0",
                        "device-peak-tflops: 0"],
}


@pytest.mark.parametrize(
    ("line", "bound"), [(line, bound) for bound, lines in OUT_OF_RANGE.items() for line in lines]
)
def test_a_number_out_of_range_is_refused_with_its_bound(line, bound, tmp_path):
    (tmp_path / "run.yaml").write_text(line)
    with pytest.raises(InputError, match=f"^{line.split(':')[0]} is .*{bound}"):
        from_flags(yaml_file=str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("line", [
    "eval-interval: 0", "eval-iters: 0", "num-workers: 0", "clip-grad: 0", "weight-decay: 0",
    "adam-beta1: 0", "seed: 0", "packing-buffer-size: 0", "lr-decay-iters: null",
])
def test_a_number_at_its_bound_is_taken(line, tmp_path):
    (tmp_path / "run.yaml").write_text(line)
    from_flags(yaml_file=str(tmp_path / "run.yaml"))


BAD = {
    "unknown key": ("trian-iters: 3", "did you mean train_iters"),
    "a word for a number": ("train-iters: many", "train-iters is 'many'; give a whole number"),
    "a fraction of a step": ("train-iters: 2.5", "give a whole number"),
    "a number for a switch": ("bf16: 1", "give true or false"),
    "a switch for a number": ("lr: true", "give a number"),
    "a value outside the choices": ("lr-decay-style: steep", "use one of cosine"),
    "two precisions": ("bf16: true\nfp16: true", "exclude one another"),
    "min above max": ("lr: 1e-5\nmin-lr: 1e-3", "must be between 0 and lr"),
    "no mapping": ("- lr", "must hold `option: value` lines"),
    "no YAML": ("lr: [1", "is not valid YAML"),
    "not UTF-8": (b"save: \xff", "is not valid YAML"),
    "an empty path": ("save: ''", "option save is empty; give a text, or leave it out"),
    "a blank path": ("load: ' '", "option load is empty"),
    "two spellings of a key": (
        "train-iters: 3\nlr: 1\ntrain_iters: 4", "both train-iters and train_iters"),
    "a list of datasets": (
        "train-data-path: [a, b]", "is \\['a', 'b'\\]; give one text, several datasets as A,B"),
    "a table for a path": ("save: {a: b}", "option save is .*; give one text\\.$"),
    "nothing for a name": ("model-size: null", "option model-size is None; give one text"),
    "no end": ("distributed-timeout-minutes: .inf", "give a finite number"),
    "no end of steps": ("train-iters: .inf", "train-iters is inf; give a whole number"),
    "nothing to train": (
        "freeze-vit: true\nfreeze-merger: true\nfreeze-llm: true", "leave nothing to train"),
    "a rate for a frozen part": (
        "freeze-merger: true\nmerger-lr: 1e-4", "merger-lr is given but freeze-merger keeps"),
    "a rate over a schedule of zeros": ("lr: 0\nmin-lr: 0\nvit-lr: 1e-4", "but lr is 0"),
    "a trace that ends before it starts": (
        "profile-step-start: 5\nprofile-step-end: 5", "must be above profile-step-start 5"),
    "a name for no tracker": (
        "wandb-exp-name: a", "wandb-exp-name is given without wandb-project"),
    "an export without a save": (
        "export-hf: true", "export-hf writes save/hf and there is no save"),
    "an export between checkpoints": (
        "save: s\nsave-interval: 10\nexport-hf-interval: 15", "15 is not a multiple of save-int"),
    "no rank": ("profile-ranks: []", "profile-ranks is empty; give at least one whole number"),
    "a word among ranks": ("profile-ranks: [0, all]", "is 'all'; give a whole number"),
    "a negative spread": ("init-method-std: -0.02", "must be at least 0"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_by_one_sentence(text, sentence, tmp_path):
    (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=sentence):
        from_flags(yaml_file=str(tmp_path / "run.yaml"))


def test_an_empty_flag_is_refused():
    with pytest.raises(InputError, match="option save is empty"):
        from_flags("--save", "")


def test_the_microbatches_fill_the_global_batch():
    batch = from_flags("--micro-batch-size", "2", "--global-batch-size", "12").batch
    assert batch.num_microbatches(dp=3) == 2
    with pytest.raises(InputError, match="use a multiple of 8"):
        batch.num_microbatches(dp=4)


LENGTHS = [  # what is typed; steps of the run, of its warmup
    (["--train-samples", "70", "--global-batch-size", "8"], (8, 0)),
    (["--train-samples", "64", "--global-batch-size", "8", "--lr-warmup-fraction", "0.25"], (8, 2)),
    (["--train-iters", "40", "--lr-warmup-fraction", "0.1"], (40, 4)),
    (["--train-iters", "40", "--lr-decay-iters", "20", "--lr-warmup-fraction", "0.1"], (40, 2)),
    (["--lr-warmup-fraction", "0"], (100, 0)),
]


@pytest.mark.parametrize(("words", "wanted"), LENGTHS)
def test_a_run_is_as_long_as_its_samples_and_the_schedule_follows(words, wanted, tmp_path):
    config = from_flags(*words)
    assert (config.batch.train_iters, config.warmup_iters) == wanted
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert from_flags(yaml_file=str(tmp_path / "again.yaml")) == config


@pytest.mark.parametrize(("words", "sentence"), [
    ("--train-iters 9 --train-samples 9", "train-iters and train-samples all say how long"),
    ("--train-samples 9 --num-train-epochs 1", "train-samples and num-train-epochs all say how"),
    ("--train-iters 9 --num-train-epochs 1", "train-iters and num-train-epochs all say how long"),
    ("--num-train-epochs 0", "num-train-epochs is 0.0; it must be above 0"),
    ("--num-train-epochs nan", "num-train-epochs is nan; it must be above 0"),
    ("--train-samples 0", "train-samples is 0; it must be at least 1"),
    ("--train-samples 7 --global-batch-size 8", "fewer than the 8 rows of one step"),
    ("--lr-warmup-fraction 1", "lr-warmup-fraction is 1.0; it must be at least 0 and less than 1"),
    ("--lr-warmup-fraction 0.1 --lr-warmup-iters 3", "lr-warmup-iters and lr-warmup-fraction excl"),
    ("--train-samples 4 --lr-warmup-iters 4", "lower it or raise train-samples"),
])
def test_lengths_that_contradict_one_another_are_refused(words, sentence):
    with pytest.raises(InputError, match=sentence):
        from_flags(*words.split())


# ---- bounds -----------------------------------------------------------------------------------


NUMBERS = {f.name: f for group in GROUPS.values() for f in fields(group)
           if kind_of(f) in (int, float)}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_bounds_and_is_refused_beyond_them(name):
    flag, bounds = name.replace("_", "-"), BOUNDS[name]
    beyond = [10**30, float("nan")] if kind_of(NUMBERS[name]) is float else [10**30]
    for value in (*beyond, -(10**30), "1e20"):
        with pytest.raises(InputError, match=f"{flag} is .*; (it must be|give a)") as refused:
            TrainConfig.from_dict({name: value})
        assert len(str(refused.value)) < 300
    assert bounds.most is not None or bounds.below is not None


def test_what_is_bounded_by_libraries_is_taken_by_them_up_to_the_bound():
    seed = BOUNDS["seed"].most
    np.random.default_rng(seed)
    np.random.RandomState(seed)
    generator = torch.Generator()
    generator.manual_seed(seed + 100 * BOUNDS["pipeline_model_parallel_size"].most)
    minutes = BOUNDS["distributed_timeout_minutes"]
    for value in (minutes.least, minutes.most):
        assert 0 < timedelta(minutes=value) / timedelta(milliseconds=1) < 2**31
    faulthandler.dump_traceback_later(BOUNDS["hang_timeout"].most)
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("line", ["wandb-project: 1.10", "save: 007", "save: 2024-01-01",
                                  "save: true", "save: !!binary aGk="])
def test_a_text_that_yaml_reads_as_something_else_is_not_guessed(line, tmp_path):
    (tmp_path / "run.yaml").write_text(line)
    with pytest.raises(InputError, match=r"give (a text, in quotes|one text)"):
        from_flags(yaml_file=str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(("words", "sentence"), [
    ("--overlap-param-gather", "needs use-distributed-optimizer and overlap-grad-reduce"),
    ("--overlap-param-gather --overlap-grad-reduce --no-use-distributed-optimizer",
     "overlap-param-gather needs use-distributed"),
    ("--overlap-param-gather --use-distributed-optimizer", "overlap-grad-reduce; give both"),
    ("--grad-reduce-in-bf16 --fp32", "is for bf16 training and this is float32; add bf16"),
    ("--grad-reduce-in-bf16 --fp16", "is for bf16 training and this is float16; add bf16"),
])
def test_an_option_without_what_it_builds_on_is_refused(words, sentence):
    with pytest.raises(InputError, match=sentence):
        from_flags(*words.split())


@pytest.mark.parametrize(("rows", "what"), [
    ("[2024-01-01]", "no list of whole numbers"), ("[1, [2]]", "no list of whole numbers"),
    (f"'{'[' * 50_000}'", "is no list"), (f"'{'9' * 6000}'", "is no list"),
])
def test_a_list_of_layers_that_yaml_reads_as_something_else_is_refused(rows, what, tmp_path):
    (tmp_path / "run.yaml").write_text(f"pp-layers: {rows}")
    text = from_flags(yaml_file=str(tmp_path / "run.yaml")).parallel.pp_layers
    with pytest.raises(InputError, match=what) as refused:
        layer_list(text, "--pp-layers")
    assert len(str(refused.value)) < 400


# What a loader that no run makes reads otherwise than a run that was told nothing.
OTHERWISE = {"shuffle_buffer_size": (100, 1000), "max_skipped_samples": (0, 100)}


def test_a_loader_has_the_defaults_of_a_run_but_for_those_that_are_meant():
    run = TrainConfig.from_dict({}).resolved()
    found = {one.name: (one.default, run[one.name]) for one in fields(DataConfig)
             if one.name in run and one.default is not MISSING}
    assert {name: both for name, both in found.items() if both[0] != both[1]} == OTHERWISE


@pytest.mark.parametrize(("precision", "pixels"), [
    ("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_a_run_leaves_nothing_to_the_defaults_of_its_loader(precision, pixels, monkeypatch):
    config = TrainConfig.from_dict({"train_data_path": "there", precision: True})
    monkeypatch.setattr(microbatches, "DataConfig", dict)
    told = microbatches._data_config(SimpleNamespace(config=config, row_multiple=None))
    assert told.keys() == {one.name for one in fields(DataConfig)}
    assert told["pixel_dtype"] == pixels
