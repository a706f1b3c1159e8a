"""What cannot run is refused from the options and config.json alone, with what to use instead."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megatron_vl.cli.main import run
from megatron_vl.errors import InputError
from megatron_vl.models import load_spec
from megatron_vl.parallel import Layout
from megatron_vl.training.checkpoint.start import _check_options, find_checkpoint
from megatron_vl.training.machine import _check_modules, _check_offload
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.plan import _recompute, plan_run
from megatron_vl.weights.mcore_io import CheckpointInfo

FULL = dict(recompute_granularity="full")
OFFLOAD = dict(fine_grained_activation_offloading=True, offload_modules="core_attn")
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
    "modules to offload that are not said": (
        dict(fine_grained_activation_offloading=True), "need one another; give both"),
    "modules to offload without the option": (
        dict(offload_modules="core_attn"), "need one another; give both"),
    "a module that is not offloaded": (
        dict(OFFLOAD, offload_modules=["moe_act"]), "offload-modules is 'moe_act'; use one of"),
    "the smallest tensor of none": (
        dict(min_offloaded_tensor_size=1), "is of what offload-modules save, which is not given"),
    "an output that is kept all the same": (
        dict(OFFLOAD, offload_modules="attn_proj"), "add core_attn"),
    "offload twice": (dict(OFFLOAD, cpu_offloading=True), "exclude one another; leave out one"),
    "offload of layers that are recomputed": (
        dict(OFFLOAD, **FULL), "have nothing to keep with recompute-granularity full"),
    "offload with a tower over stages": (
        dict(OFFLOAD, pipeline_model_parallel_size=2, vit_pp_layers="1,1", pp_layers="0,4"),
        "needs language layers on every stage and chunk"),
    "gradients in bf16 of a float32 model": (
        dict(grad_reduce_in_bf16=True), "is for bf16 training and this is float32; add bf16"),
    "selective recompute of layers in 8 bits": (
        dict(fp8_format="hybrid", bf16=True, recompute_granularity="selective"),
        "selective has nothing to recompute with fp8-format"),
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


ALONE = dict(packing_buffer_size=0)
PP2 = dict(pipeline_model_parallel_size=2)
WIDE = dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2)


@pytest.mark.parametrize(("options", "world", "multiple"), [
    (ALONE, 1, 64), (PP2 | ALONE, 2, 64), (WIDE | ALONE, 4, 64), (dict(), 1, None),
    # Megatron-Core would swap the lengths that virtual stages tell one another.
    (dict(**PP2, **ALONE, num_virtual_stages_per_pipeline_rank=2), 2, None),
])
def test_rows_of_one_sample_vary_in_length_where_the_layout_lets_them(
    options, world, multiple, model_dir
):
    plan = plan_run(config(model_dir, **options, global_batch_size=2), world)
    assert plan.row_multiple == multiple
    assert ("at most 2048 tokens" in plan.described_length) == (multiple is not None)


PRECISIONS = {
    "config.json's": ("bfloat16", {}, "bfloat16, as config.json says"),
    "another config.json's": ("float16", {}, "float16, as config.json says"),
    "fp32": ("bfloat16", dict(fp32=True), "float32"),
    "not bf16": ("bfloat16", dict(bf16=False), "float32"),
    "not fp16": ("bfloat16", dict(fp16=False), "bfloat16, as config.json says"),
    "not fp32": ("bfloat16", dict(fp32=False), "bfloat16, as config.json says"),
    "bf16": ("float32", dict(bf16=True), "bfloat16"),
    "fp8": ("bfloat16", dict(bf16=True, fp8_format="hybrid"), "bfloat16"),
}


@pytest.mark.parametrize(("own", "options", "says"), PRECISIONS.values(), ids=PRECISIONS)
def test_the_precision_is_config_jsons_where_no_option_says_it(
    own, options, says, model_dir, tmp_path
):
    values = json.loads((model_dir / "config.json").read_text())
    values.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps({**values, "dtype": own}))
    plan = plan_run(config(tmp_path, **options), 1, here=False)
    assert plan.precision == says and plan.config.model.dtype == says.partition(",")[0]
    assert TrainConfig.from_dict(plan.config.to_dict()) == plan.config


@pytest.mark.parametrize(("had", "finetune", "says"), [
    (dict(fp16=True), False, "float16, as the checkpoint says"),
    (dict(fp32=True), False, "float32, as the checkpoint says"),
    (dict(bf16=False, fp16=False), False, "float32, as the checkpoint says"),  # of an older version
    (dict(bf16=True), True, "float32, as config.json says"),
])
def test_a_resumed_run_keeps_its_precision(had, finetune, says, model_dir, tmp_path, monkeypatch):
    info = checkpoint_of(had, tmp_path)
    monkeypatch.setattr("megatron_vl.training.checkpoint.start.inspect_weights", lambda _: info)
    plan = plan_run(config(model_dir, load=str(model_dir), finetune=finetune), 1)
    assert plan.precision == says


def checkpoint_of(args: dict, where) -> CheckpointInfo:
    """What a run with these options would have left."""
    return CheckpointInfo(
        format="torch_dist", root=where, path=where, iteration=5, release=False, layout=Layout(),
        split=None, model_type=None, dtype=None, args=args,
    )


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


@pytest.mark.parametrize(("modules", "variable", "sentence"), [
    (["core_attn", "mlp_norm"], "1", "has mlp_norm, which TransformerEngine's layers have not"),
    (["core_attn"], "0", "needs NVTE_CPU_OFFLOAD_V1=1 in the environment"),
    (["core_attn"], "1", None),
])
def test_layers_of_transformer_engine_offload_what_they_have_and_no_weight(
    modules, variable, sentence, model_dir, monkeypatch
):
    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", variable)
    options = config(model_dir, **OFFLOAD | dict(offload_modules=modules))
    if sentence is None:
        _check_modules(options)
        return
    with pytest.raises(InputError, match=sentence):
        _check_modules(options)


def test_offloading_every_layer_is_refused(model_dir):
    options = config(model_dir, cpu_offloading=True, cpu_offloading_num_layers=4)
    with pytest.raises(InputError, match="must be less than the model's 4 language layers"):
        _recompute(options, load_spec(model_dir).split())


def test_offloading_the_optimizer_of_a_gpu_says_what_it_needs(model_dir):
    usable = dict(optimizer_cpu_offload=True, bf16=True, use_distributed_optimizer=True)
    _check_offload(config(model_dir, **usable), transformer_engine=True)
    for change in ({"bf16": False}, {"use_distributed_optimizer": False}):
        with pytest.raises(InputError, match="needs bf16 and use-distributed-optimizer"):
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
        source, is_own = find_checkpoint(plan.config, plan.spec)
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
    with pytest.raises(InputError, match="^--load gone does not exist; give the directory of"):
        plan_run(TrainConfig.from_dict(values | {"load": "gone"}), 1)


@pytest.mark.parametrize("hf_config", [False, True])
def test_a_load_that_is_needed_and_not_there_is_named(hf_config, model_dir, tmp_path, capsys):
    more = {"hf_config": model_dir} if hf_config else {}
    load = tmp_path / "none"
    code, text = told(tmp_path / "new", True, capsys, load=load, **more)
    assert code == 2 and f"--load {load} does not exist; give" in text
    code, text = told(tmp_path / "new", False, capsys, load=load, **more)
    assert code == (0 if hf_config else 2) and f"load {load} is not there yet" in text


def test_both_towers_recompute_what_the_plan_says(model_dir):
    plan = plan_run(config(model_dir, **FULL, vit_recompute_granularity="selective"), 1)
    assert (plan.recompute.granularity, plan.vit_recompute.granularity) == ("full", "selective")


SHARE = dict(lr_warmup_fraction=0.1)
RESUMED = {  # what the run had, what it has, what is refused
    "longer": (dict(train_iters=10), dict(train_iters=20), None),
    "shorter": (dict(train_iters=20), dict(train_iters=10), None),
    "longer, a warmup that is a share": (
        dict(train_iters=10, **SHARE), dict(train_iters=50, **SHARE), None),
    "longer by samples": (dict(train_iters=10), dict(train_samples=20), None),
    "longer, a schedule of its own": (
        dict(train_iters=10, lr_decay_iters=10), dict(train_iters=20, lr_decay_iters=10), None),
    "longer than the schedule was": (
        dict(train_iters=10), dict(train_iters=20, lr_decay_iters=10), None),
    "another schedule": (
        dict(train_iters=10), dict(train_iters=20, lr_decay_iters=15), "lr-decay-iters 10"),
    "a schedule that no longer ends by itself": (
        dict(train_iters=10, lr_decay_iters=10), dict(train_iters=20), "lr-decay-iters 10"),
    "another share": (
        dict(train_iters=10, **SHARE), dict(train_iters=20, lr_warmup_fraction=0.2),
        "lr-warmup-iters 1 "),
    "another rate": (dict(lr=1e-4), dict(lr=2e-4, train_iters=200), "lr 0.0001"),
    "another end": (dict(min_lr=1e-7), dict(), "min-lr 1e-07"),
    "another decay": (dict(), dict(lr_decay_style="linear"), "lr-decay-style cosine"),
}


@pytest.mark.parametrize(("had", "has", "refused"), RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_may_have_another_length_and_nothing_else_of_its_schedule(
    had, has, refused, tmp_path
):
    before, now = TrainConfig.from_dict(had), TrainConfig.from_dict(has)
    info = checkpoint_of(before.resolved(), tmp_path)
    if refused is None:
        return _check_options(now, info)
    with pytest.raises(InputError, match=f"was trained with {refused}"):
        _check_options(now, info)
    _check_options(TrainConfig.from_dict({**has, "override_opt_param_scheduler": True}), info)


def test_a_run_without_todays_default_optimizer_is_told_so(tmp_path):
    before = TrainConfig.from_dict({"use_distributed_optimizer": False})
    info = checkpoint_of(before.resolved(), tmp_path)
    says = "with use-distributed-optimizer false but this run has true; give the old value"
    with pytest.raises(InputError, match=says):
        _check_options(TrainConfig.from_dict({}), info)
    _check_options(before, info)
