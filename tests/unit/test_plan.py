"""What cannot run is refused from the options and config.json alone, with what to use instead."""

from __future__ import annotations

import shutil

import pytest
import torch

from megatron_vl.cli.main import run
from megatron_vl.errors import InputError
from megatron_vl.models import load_spec
from megatron_vl.training.config import TrainConfig
from megatron_vl.training.plan import _check_offload, _recompute, find_checkpoint, plan_run

FULL = dict(recompute_granularity="full")
REFUSED = {
    "groups that do not divide": (
        dict(**FULL, recompute_num_layers=3),
        "recompute-num-layers 3 does not divide the language layers of every stage (llm 4, vision "
        "2), as recompute-method uniform needs; give a divisor, or recompute-method block."),
    "more layers than the smallest stage has": (
        dict(**FULL, recompute_num_layers=2, recompute_method="block",
             pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=1),
        "more than the 1 language layers of the smallest stage (llm 1-3, vision 2-0); give at most "
        "1, or recompute-method uniform"),
    "more vision layers than there are": (
        dict(vit_recompute_granularity="full", vit_recompute_num_layers=3,
             recompute_method="block"),
        "vit-recompute-num-layers 3 is more than the 2 vision layers"),
    "offload over stages": (
        dict(cpu_offloading=True, pipeline_model_parallel_size=2),
        "needs a pipeline of one stage; use recompute-granularity full"),
    "offload and recompute": (
        dict(cpu_offloading=True, **FULL), "use recompute-granularity full alone"),
    "offload and recompute of the vision tower": (
        dict(cpu_offloading=True, vit_recompute_granularity="full"), "exclude one another"),
    "a backend nobody knows": (
        dict(attention_backend="flashy"), "attention-backend is 'flashy'; use one of auto"),
    "a share above the whole": (
        dict(optimizer_offload_fraction=1.5), "offload-fraction is 1.5; it must be at least 0"),
    "traces without a place": (
        dict(profile=True), "profile has no directory for its traces; give profile-dir"),
    "traces after the end": (
        dict(profile=True, profile_dir="x", train_iters=9),
        "profile-step-start 10 is after the last of 9 steps; lower it, or raise train-iters"),
    "traces of a rank there is not": (
        dict(profile=True, profile_dir="x", profile_ranks=[0, 1]),
        "profile-ranks has 1 but this run has ranks 0 to 0; leave it out"),
    "a page of no numbers": (
        dict(report_file="x.html"), "report-file needs the run's numbers and its page; give "
        "metrics-file or save"),
}
WITHOUT_GPU = {
    "offload": (dict(cpu_offloading=True), "TransformerEngine on a CUDA device and this machine"),
    "fp8": (dict(bf16=True, fp8_format="hybrid"), "this machine has none; use bf16."),
}


def config(model_dir, **options) -> TrainConfig:
    return TrainConfig.from_dict(
        dict(hf_config=str(model_dir), train_data_path=str(model_dir), **options))


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused_with_what_to_use_instead(options, sentence, model_dir):
    with pytest.raises(InputError) as refused:
        plan_run(config(model_dir, **options), options.get("pipeline_model_parallel_size", 1))
    assert sentence in str(refused.value)


def test_what_is_shown_goes_beside_the_metrics_unless_told(model_dir):
    def places(**options):
        plan = plan_run(config(model_dir, **options), 1)
        return [one and str(one) for one in (plan.metrics_file, plan.report_file, plan.profile_dir)]

    assert places() == [None] * 3
    assert places(save="s") == ["s/metrics.jsonl", "s/report.html", "s/profile"]
    assert places(save="s", metrics_file="log/a.jsonl", tensorboard_dir="board") == [
        "log/a.jsonl", "log/a.html", "board"]
    assert places(save="s", report=False, profile_dir="p") == ["s/metrics.jsonl", None, "p"]
    assert places(save="s", report_file="r.html") == ["s/metrics.jsonl", "r.html", "s/profile"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize(("options", "sentence"), WITHOUT_GPU.values(), ids=WITHOUT_GPU)
def test_what_needs_a_gpu_is_refused_without_one(options, sentence, model_dir):
    with pytest.raises(InputError) as refused:
        plan_run(config(model_dir, **options), 1)
    assert sentence in str(refused.value)


def test_offloading_every_layer_is_refused(model_dir):
    options = config(model_dir, cpu_offloading=True, cpu_offloading_num_layers=4)
    with pytest.raises(InputError, match="must be less than the model's 4 language layers"):
        _recompute(options, load_spec(model_dir).split())


def test_offloading_the_optimizer_of_a_gpu_says_what_it_needs(model_dir):
    usable = dict(optimizer_cpu_offload=True, bf16=True, use_distributed_optimizer=True)
    _check_offload(config(model_dir, **usable), transformer_engine=True)
    for change in ({"bf16": False}, {"use_distributed_optimizer": False}):
        with pytest.raises(InputError, match="needs bf16 .* and use-distributed-optimizer"):
            _check_offload(config(model_dir, **{**usable, **change}), transformer_engine=True)
    with pytest.raises(InputError, match="needs TransformerEngine, which is not installed"):
        _check_offload(config(model_dir, **usable), transformer_engine=False)


@pytest.fixture(scope="module")
def own(model_dir, tmp_path_factory):
    """A SAVE that a run goes on from."""
    save = tmp_path_factory.mktemp("run") / "save"
    assert run(["convert", str(model_dir), str(save)]) == 0
    return save


def told(own, here: bool, capsys, **options) -> tuple[int, str]:
    """What `train --dry-run`, or the checks of a start, answer."""
    values = {"save": own, "train_data_path": "x", "nproc_per_node": 1, **options}
    words = [str(one) for name, value in values.items()
             for one in (f"--{name.replace('_', '-')}", value)]
    code = run(["train", *(() if here else ["--dry-run"]), *words])
    out, err = capsys.readouterr()
    return code, err if code else out


def test_a_run_that_goes_on_from_save_takes_its_model_from_there(own, model_dir, tmp_path, capsys):
    for load in (tmp_path / "gone", model_dir):
        values = {"save": str(own), "load": str(load), "train_data_path": "x"}
        plan = plan_run(TrainConfig.from_dict(values), 1)
        source, is_own = find_checkpoint(plan)
        assert plan.hf_dir == own and is_own and source.path == own / "release"
        given = TrainConfig.from_dict(values | {"hf_config": str(model_dir)})
        assert plan_run(given, 1).hf_dir == model_dir
    code, text = told(own, False, capsys, load=tmp_path / "gone")
    assert code == 0 and f"weights come from {own / 'release'}" in text, text
    assert "note: load" not in text


def test_a_save_without_a_config_json_takes_it_from_load(own, model_dir, tmp_path):
    save = tmp_path / "save"
    shutil.copytree(own, save)
    (save / "config.json").unlink()
    values = {"save": str(save), "load": str(model_dir), "train_data_path": "x"}
    assert plan_run(TrainConfig.from_dict(values), 1).hf_dir == model_dir
    with pytest.raises(InputError, match="^load .* gone does not exist; give --load"):
        plan_run(TrainConfig.from_dict(values | {"load": "gone"}), 1)


@pytest.mark.parametrize("hf_config", [False, True])
def test_a_load_that_is_needed_and_not_there_is_named(hf_config, model_dir, tmp_path, capsys):
    more = {"hf_config": model_dir} if hf_config else {}
    load = tmp_path / "none"
    code, text = told(tmp_path / "new", True, capsys, load=load, **more)
    assert code == 2 and f"load (PRETRAIN_CHECKPOINT_PATH) {load} does not exist; give" in text
    code, text = told(tmp_path / "new", False, capsys, load=load, **more)
    assert code == (0 if hf_config else 2) and f"load {load} is not there yet" in text


def test_both_towers_recompute_what_the_plan_says(model_dir):
    plan = plan_run(config(model_dir, **FULL, vit_recompute_granularity="selective"), 1)
    assert (plan.recompute.granularity, plan.vit_recompute.granularity) == ("full", "selective")
