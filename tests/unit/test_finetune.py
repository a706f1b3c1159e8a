"""`megatron-vl finetune`: what the flags of transformers' Trainer become, and a run of them."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT, megatron_vl, shell
from peft import LoraConfig
from test_clusters import free_port
from test_docs import LINK, blocks, headings, parser, prose
from tiny_hf import read
from transformers import TrainerState, TrainingArguments, get_scheduler

from megatron_vl.errors import InputError
from megatron_vl.models.baichuan2.tiny import TEXT
from megatron_vl.models.registry import family, load_spec
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.options.hf_run import set_intervals
from megatron_vl.training.options.hf_trainer import DEFAULTS, FLAGS, LORA_DEFAULTS, translate

SHIM = "examples/baichuan2/fine_tune_train.sh"


def given(**flags: str):
    return given_to({}, **flags)


def given_to(own_defaults: dict[str, str], **flags: str):
    return translate(dict.fromkeys(FLAGS) | {"model_name_or_path": "m"} | flags, own_defaults)


def test_a_flag_that_is_not_given_has_the_trainers_own_default():
    trainers = {one.name: one.default for one in dataclasses.fields(TrainingArguments)}
    for flag, default in DEFAULTS.items():
        of_trainer = trainers[flag]
        assert type(of_trainer)(default) == of_trainer, flag
    of_peft = {one.name: one.default for one in dataclasses.fields(LoraConfig)} | {"lora_r": 8}
    for flag, default in list(LORA_DEFAULTS.items())[:3]:
        assert float(default) == of_peft[flag], flag
    assert "--lr 5e-5 --weight-decay 0 --adam-beta1 0.9" in " ".join(given().words)


@pytest.mark.parametrize(("model_dir", "own"), [
    ("baichuan_model_dir", {"--seq-length": "512"}),
    ("resampler_model_dir", {"--seq-length": "8192", "--freeze-vit": ""}),
    ("text_model_dir", {}),
])
def test_the_models_own_script_has_defaults_before_the_trainer(model_dir, own, request):
    spec = load_spec(request.getfixturevalue(model_dir))
    words = given_to(family(spec.model_type).finetune_defaults()).words
    assert {flag for flag in ("--seq-length", "--freeze-vit") if flag in words} == own.keys()
    assert all(f"{flag} {value}".strip() in " ".join(words) for flag, value in own.items())
    typed = given_to({"fix_vit": "True", "model_max_length": "512"}, fix_vit="False",
                     model_max_length="9").words
    assert "--freeze-vit" not in typed and "512" not in typed


BECOME = [  # flags, and options that they come to
    ({"bf16": "True", "fp16": "False"}, ["--bf16"]),
    ({"gradient_checkpointing": "True"}, ["--recompute-granularity", "full"]),
    ({"lr_scheduler_type": "constant"}, ["--lr-decay-style", "constant", "--min-lr", "0"]),
    ({"max_steps": "7"}, ["--train-iters", "7"]),
    ({"max_steps": "-1"}, ["--num-train-epochs", "3"]),
    ({"warmup_ratio": "0.1"}, ["--lr-warmup-fraction", "0.1"]),
    ({"warmup_steps": "0.1"}, ["--lr-warmup-fraction", "0.1"]),
    ({"warmup_steps": "10", "warmup_ratio": "0.1"}, ["--lr-warmup-iters", "10"]),
    ({"warmup_ratio": "0.1", "warmup_steps": "0"}, ["--lr-warmup-fraction", "0.1"]),
    ({"warmup_steps": "10", "lr_scheduler_type": "constant_with_warmup"},
     ["--lr-warmup-iters", "10"]),
    ({"fix_vit": "True"}, ["--freeze-vit"]),
]


@pytest.mark.parametrize(("flags", "words"), BECOME, ids=str)
def test_a_flag_becomes_an_option_and_is_told(flags, words):
    made = given(**flags)
    assert " ".join(words) in " ".join(made.words)
    assert any(f"-> {words[0]}" in line for line in made.told)
    assert ("--num-train-epochs" in made.words) == ("--train-iters" not in made.words)


IGNORED = [  # flags, and that of them which does nothing
    ({"max_steps": "-1"}, "max_steps"), ({"max_steps": "7", "num_train_epochs": "2"},
                                         "num_train_epochs"),
    ({"lr_scheduler_type": "constant", "warmup_ratio": "0.1"}, "warmup_ratio"),
    ({"lr_scheduler_type": "constant", "warmup_steps": "9"}, "warmup_steps"),
    ({"warmup_steps": "9", "warmup_ratio": "0.1"}, "warmup_ratio"),
    ({"warmup_steps": "0", "warmup_ratio": "0.1"}, "warmup_steps"), ({"tf32": "True"}, "tf32"),
    ({"load_best_model_at_end": "True"}, "load_best_model_at_end"),
]


@pytest.mark.parametrize(("flags", "ignored"), IGNORED, ids=str)
def test_a_flag_that_does_nothing_is_told(flags, ignored):
    made = given(**flags)
    told = [line for line in made.told if line.startswith(f"--{ignored} ")]
    assert len(told) == 1 and f"{flags[ignored]} is ignored: " in told[0]
    assert f"--{ignored}" not in made.called.values()


@pytest.mark.parametrize("style", ["linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [{"warmup_ratio": "0.25"}, {"warmup_steps": "3"},
                                    {"warmup_steps": "3", "warmup_ratio": "0.25"}, {}], ids=str)
def test_the_warm_up_is_as_long_as_transformers_own(style, warmup):
    words = given(max_steps="12", lr_scheduler_type=style, **warmup).words
    args = vars(parser("train").parse_args(words))
    ours = TrainConfig.from_dict({name: value for name, value in args.items() if name in (
        "train_iters", "lr_warmup_iters", "lr_warmup_fraction")})
    steps = float(warmup.get("warmup_steps", 0)) or 12 * float(warmup.get("warmup_ratio", 0))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    (rate,) = get_scheduler(style, optimizer, int(steps), 12).lr_lambdas
    assert [rate(step) for step in range(12)].index(1.0) == ours.warmup_iters


REFUSED = [
    ({"use_lora": "often"}, "--use_lora is 'often'; use True or False"),
    ({"q_lora": "True"}, "give -- --quantize-base nf4 behind the other flags"),
    ({"bf16": "maybe"}, "--bf16 is 'maybe'; use True or False"),
    ({"lr_scheduler_type": "polynomial"}, "--lr_scheduler_type is 'polynomial'"),
    ({"max_steps": "many"}, "--max_steps is 'many'; it must be a number"),
    ({"warmup_steps": "nan"}, "--warmup_steps is 'nan'; it must be a number"),
]


@pytest.mark.parametrize(("flags", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_is_not_here_is_refused(flags, says):
    with pytest.raises(InputError, match=re.escape(says)):
        given(**flags)


DEEPSPEED = [  # a configuration, the options that it comes to, and what is told
    ({"zero_optimization": {"stage": 3}}, ["--use-distributed-optimizer"], "ZeRO 3 becomes"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
     ["--use-distributed-optimizer", "--optimizer-cpu-offload"], "offload_optimizer becomes"),
    ({"bf16": {"enabled": True}}, ["--bf16", "--no-use-distributed-optimizer"],
     "bf16 becomes --bf16"),
    ({"zero_optimization": {"stage": 0, "overlap_comm": True}, "flops_profiler": {}},
     ["--no-use-distributed-optimizer"],
     "ignored, as there is no DeepSpeed here: flops_profiler, overlap_comm"),
    ({"gradient_clipping": 0.5}, None, "gradient_clipping is 0.5, but --max_grad_norm is 1"),
    ({"gradient_accumulation_steps": 4}, None, "but --gradient_accumulation_steps is 1"),
    ({"gradient_clipping": ["x"]}, None, "gradient_clipping is ['x'], but --max_grad_norm is 1"),
    ({"zero_optimization": {"stage": [3]}}, None, "zero_optimization.stage is [3]"),
    ({"zero_optimization": {"stage": 7}}, None, "zero_optimization.stage is 7"),
    ({"zero_optimization": 3}, None, "zero_optimization is 3; it must be a table"),
]


@pytest.mark.parametrize(("config", "words", "says"), DEEPSPEED, ids=[row[2] for row in DEEPSPEED])
def test_deepspeeds_configuration_is_read(config, words, says, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    if words is None:
        with pytest.raises(InputError, match=re.escape(says)):
            given(deepspeed=str(path))
        return
    made = given(deepspeed=str(path))
    *before, without = given().words
    assert without == "--no-use-distributed-optimizer"
    assert made.words == [*before, *words]
    assert any(says in line for line in made.told), made.told


@pytest.fixture(scope="module")
def belle(tmp_path_factory):
    path = tmp_path_factory.mktemp("belle") / "belle.json"
    lines = TEXT.strip().splitlines()
    path.write_text(json.dumps([
        {"id": str(number), "conversations": [
            {"from": "human", "value": f"Line {number % 2}?\n"},
            {"from": "gpt", "value": f"{lines[number % 2][:40]}\n"}]}
        for number in range(32)
    ] + [{"id": "long", "conversations": [
        {"from": "human", "value": lines[0] * 9}, {"from": "gpt", "value": lines[0]}]}]))
    return path


def test_the_official_flags_train_on_a_cpu_and_leave_a_model(belle, baichuan_model_dir, tmp_path):
    words = [belle, baichuan_model_dir, tmp_path / "out", "--num_train_epochs", 2,
             "--per_device_train_batch_size", 4, "--learning_rate", "2e-3", "--bf16", "False",
             "--model_max_length", 48, "--lr_scheduler_type", "linear",
             "--logging_steps", 0.05, "--", "--tp", 2, "--num-workers", 0]
    done = shell(SHIM, *words)
    assert done.code == 0, done.text
    losses = [float(one) for one in re.findall(r"'loss': ([\d.]+)", done.out)]
    assert len(losses) == 16 and losses[-1] < 0.7 * losses[0]
    assert "rows of a step, over all processes -> --global-batch-size 4" in done.out
    assert "--save_strategy epoch -> --save-interval 9" in done.out, "of 33 samples"
    assert "--logging_steps 0.05 -> --log-interval 1" in done.out, "of 17 steps"
    assert "of the first 48, which a row holds; raise --model_max_length, or remove" in done.out
    assert ("--num_train_epochs 2 came to 16 steps instead of the 17 of its schedule, as samples "
            "were left out") in done.out
    assert "--tf32 True is ignored" in done.out
    assert "long samples" not in done.out
    trained, before = read(tmp_path / "out" / "hf"), read(baichuan_model_dir)
    assert trained.keys() == before.keys()
    assert not (trained["lm_head.weight"] == before["lm_head.weight"]).all()


PAGES = [("baichuan2", SHIM, 12), ("qwen_vl", "examples/qwen_vl/finetune_ds.sh", 9)]


@pytest.mark.parametrize(("folder", "shim", "commands"), PAGES)
def test_both_languages_have_the_same_commands_and_every_command_is_taken(folder, shim, commands):
    pages = [f"examples/{folder}/{name}" for name in ("README.md", "README_zh.md")]
    both = [[line for block in blocks(page, "bash")
             for line in block.replace("\\\n", " ").splitlines()] for page in pages]
    assert both[0] == both[1]
    levels = [[level for level, _ in headings(page)] for page in pages]
    assert levels[0] == levels[1]
    taken = 0
    for words in map(shlex.split, both[0]):
        if words[0] == "megatron-vl":
            parser(words[1]).parse_args(words[2:])
        taken += words[0] == "megatron-vl" or shim in words
    assert taken == commands
    assert all((ROOT / "examples" / folder / link).exists() for page in pages
               for link in LINK.findall(prose(page)))


@pytest.mark.parametrize(("options", "says"), [
    (["--tp", 4, "--pp", 2, "--nproc-per-node", 16], [
        "--global-batch-size 32", "has 7,505,973,248 parameters; TP 4 x PP 2 ranks hold"]),
    # Four ranks have no room for four replicas; a step has their rows all the same.
    (["--layout", "auto", "--gpu", "24g", "--nnodes", 4, "--node-rank", 0, "--nproc-per-node", 1,
      "--micro-batch-size", 1], ["64 microbatches x 1 rows x 1 data ranks", "PP 4 ranks hold",
                                 "--layout auto changes no rows of a step"]),
])
def test_the_true_size_is_planned_from_config_and_tokenizer_alone(
    options, says, belle, baichuan_model_dir, tmp_path
):
    model = tmp_path / "Baichuan2-7B-Chat"
    model.mkdir()
    config = json.loads((baichuan_model_dir / "config.json").read_text()) | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 125696, "max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps(config))
    shutil.copy(baichuan_model_dir / "tokenizer.model", model)
    done = shell(SHIM, belle, model, tmp_path / "out", "--dry-run", "--", *options)
    assert done.code == 0 and all(one in done.out for one in says), done.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["0.1", "10.0", "0.25", "1", "1e-9"])
def test_steps_between_saves_and_logs_may_be_a_share_of_the_run(value):
    theirs, number = TrainerState(), float(value)
    theirs.compute_steps(
        SimpleNamespace(save_steps=number, logging_steps=number, eval_steps=None), 93)
    made = given(save_steps=value, logging_steps=value, max_steps="93")
    set_intervals(made, TrainConfig.from_dict({"train_iters": 93}), prepared=False)
    assert made.words[-4:] == ["--save-interval", str(int(theirs.save_steps)),
                               "--log-interval", str(int(theirs.logging_steps))]


def test_several_nodes_are_told_how_to_prepare_raw_data(belle, baichuan_model_dir, tmp_path):
    """As torchrun starts the second of two nodes."""
    torchrun = {"LOCAL_RANK": 0, "RANK": 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = megatron_vl("finetune", "--data_path", belle, "--model_name_or_path", baichuan_model_dir,
                       "--output_dir", tmp_path / "out", "--data-format", "qwen_vl", **torchrun)
    command = f"megatron-vl prepare {belle} DIR --format qwen_vl --split 1,0,0"
    assert done.code == 2 and f"which 2 nodes would prepare at once; run {command} on" in done.err
    assert not (tmp_path / "out").exists()
    parser("prepare").parse_args(shlex.split(command)[2:])


def test_what_the_run_would_be_refused_for_is_said_before_data_are_prepared(
    belle, baichuan_model_dir, tmp_path
):
    done = shell(SHIM, belle, baichuan_model_dir, tmp_path / "out", "--", "--tp", 3,
                 "--nproc-per-node", 3)
    assert done.code == 2 and "TP 3 does not divide" in done.err, done.text
    assert not (tmp_path / "out").exists()


BAD = [  # flags in place of the shim's, and what is said
    (["--data_path", "none"], "--data_path none is neither a JSON file nor a dataset"),
    (["--learning_rate", "fast"],
     "finetune: argument --learning_rate: invalid float value: 'fast'"),
    (["--max_steps", "0"], "megatron-vl finetune: --max_steps is 0; it must be at least 1"),
    (["--warmup_steps", "-3"], "megatron-vl finetune: --warmup_steps"),
    (["--save_steps", "2.5"], "--save_steps is '2.5'; it must be a whole number of steps, or a"),
    (["--logging_steps", "0"], "--logging_steps is '0'; it must be a whole number of steps"),
    (["--save_strategy", "often"], "--save_strategy is 'often'; use no, steps or epoch"),
    (["--gradient_accumulation_steps", "0.5"], "--gradient_accumulation_steps is '0.5'"),
    (["--lora_rank", "8"], "unrecognized argument --lora_rank"),
    (["--use_lora", "True", "--lora_r", "0"], "--lora_r is 0; it must be at least 1"),
    (["--use_lora", "True", "--lora_target_modules", "q_proj"],
     "--lora_target_modules q_proj names no linear layer of this model, which has W_pack"),
]


@pytest.mark.parametrize(("flags", "says"), BAD, ids=[says for _, says in BAD])
def test_a_bad_flag_is_one_sentence(flags, says, belle, baichuan_model_dir, tmp_path):
    done = megatron_vl("finetune", "--data_path", belle, "--model_name_or_path", baichuan_model_dir,
                       "--output_dir", tmp_path / "out", *flags, "--dry-run")
    assert done.code == 2 and says in done.err and "Traceback" not in done.err, done.text
    assert not (tmp_path / "out").exists()
