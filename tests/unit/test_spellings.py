"""Options by their other names, words that are no option's, and what messages call an option."""

import argparse
import ast
import contextlib
import re

import pytest
from commands import ROOT
from test_convert_shells import FAMILY, TRAINER, shell

from megatron_vl.cli import convert, parity
from megatron_vl.cli.main import Parser, run
from megatron_vl.errors import CALLED, InputError, as_called
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.options.config_sources import add_arguments, load_config
from megatron_vl.training.options.groups import GROUPS
from megatron_vl.training.options.spellings import ALSO, ANSWERS

OPTIONS = {name for group in GROUPS.values() for name in group.__dataclass_fields__}


def train(*words, **environ) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return load_config(vars(parser.parse_args(words)), None, environ)


# ---- one name for one thing ----------------------------------------------------------------------

LAYOUT = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size",
          "vp": "num_virtual_stages_per_pipeline_rank",
          "first_stage_layers": "decoder_first_pipeline_num_layers"}


@pytest.mark.parametrize(("short", "long"), LAYOUT.items())
def test_a_layout_has_the_same_names_in_every_command(short, long, tmp_path):
    short_flag, long_flag = (f"--{name.replace('_', '-')}" for name in (short, long))
    file = tmp_path / "run.yaml"
    file.write_text(f"{short_flag[2:]}: 2\n")
    runs = [train(short_flag, "2"), train(long_flag, "2"), load_config({}, str(file), {}),
            train(**{f"MEGATRON_VL_{short.upper()}": "2"})]
    assert {run.resolved()[long] for run in runs} == {2}
    for command, where in ((convert, ["SRC", "DST"]), (parity, ["HF"])):
        parser = argparse.ArgumentParser()
        command.add_parser(parser.add_subparsers(dest="command"))
        for flag in (short_flag, long_flag):
            args = parser.parse_args([
                command.__name__.split(".")[-1], *where, flag, "2", "--dtype", "bf16",
                "--pp-layers", "1", "--vit-pp-layers", "1",
            ])
            assert getattr(args, short) == 2 and args.dtype == "bfloat16"
    with pytest.raises(InputError, match=f"{long_flag[2:]} is given as .* too"):
        TrainConfig.from_dict({long: 2, short: 2})


def test_explicit_layers_are_taken_by_train_as_by_convert(model_dir):
    from megatron_vl.training.plan import plan_run

    given = dict(hf_config=str(model_dir), train_data_path="x", pp=2, global_batch_size=2)
    for lists in (dict(pp_layers="0,4", vit_pp_layers="1,1"),
                  dict(pp_layers=[0, 4], vit_pp_layers=[1, 1])):  # of YAML
        assert str(plan_run(TrainConfig.from_dict(given | lists), 2).split) == "llm 0-4, vision 1-1"
    for lists, says in ((dict(pp_layers="1,1"), "sums to 2"), (dict(pp_layers="a"), "is no list"),
                        (dict(pp_layers="1,3", first_stage_layers=1), "not both")):
        with pytest.raises(InputError, match=says):
            plan_run(TrainConfig.from_dict(given | lists), 2)


def test_of_a_tower_of_which_nothing_is_said_the_checkpoint_has_the_layers(model_dir, tmp_path):
    from megatron_vl.training.plan import plan_run

    words = ["--pp", "2", "--pp-layers", "0,4", "--vit-pp-layers", "1,1"]
    assert run(["convert", str(model_dir), str(tmp_path / "m"), *words]) == 0
    given = dict(load=str(tmp_path / "m"), train_data_path="x", pp=2, global_batch_size=2)
    for lists, split in (
        ({}, "llm 0-4, vision 1-1"), (dict(vit_pp_layers="2,0"), "llm 0-4, vision 2-0"),
        (dict(pp_layers="0,4"), "llm 0-4, vision 1-1"),
        (dict(first_stage_layers=1), "llm 1-3, vision 2-0"),
    ):
        assert str(plan_run(TrainConfig.from_dict(given | lists), 2).split) == split


def test_a_precision_takes_the_place_of_one_that_was_said_before(tmp_path):
    (tmp_path / "run.yaml").write_text("bf16: true\nfp16: false\nfp32: false\n")
    for flags, environ, dtype in (
        ({}, {}, "bfloat16"), ({"fp32": True}, {}, "float32"),
        ({}, {"MEGATRON_VL_FP16": "true"}, "float16"),
    ):
        config = load_config(flags, str(tmp_path / "run.yaml"), environ)
        assert config.model.dtype == dtype


# ---- Megatron-LM's flags -------------------------------------------------------------------------

TAKEN = {
    "exit-interval": (
        ["--exit-interval", "5", "--save", "s"], lambda c: c.batch.exit_interval == 5),
    "exit-duration": (
        ["--exit-duration-in-mins", "30", "--save", "s"],
        lambda c: c.batch.exit_duration_in_mins == 30),
    "ckpt-format": (["--ckpt-format", "torch_dist"], lambda c: True),
    "per token": (
        ["--calculate-per-token-loss"], lambda c: not c.batch.calculate_per_sample_loss),
    "no validation": (["--eval-iters", "0"], lambda c: not c.data.validates),
    "some validation": (["--eval-iters", "1"], lambda c: c.data.validates),
    "all of the validation split": ([], lambda c: c.data.validates),
}


@pytest.mark.parametrize(("words", "holds"), TAKEN.values(), ids=TAKEN)
def test_megatron_lms_flags_are_taken(words, holds):
    assert holds(train(*words))


@pytest.mark.parametrize(("options", "says"), [
    (dict(exit_interval=5), "there is no save to keep them; give save"),
    (dict(exit_duration_in_mins=5), "there is no save to keep them; give save"),
    (dict(exit_interval=0), "exit-interval is 0; it must be at least 1"),
    (dict(early_stop=0), "early-stop is 0; it must be at least 1"),
    (dict(early_stop=2, eval_iters=0), "early-stop compares validations, and eval-iters 0 means"),
    (dict(save_best="eval_exact", eval_interval=0),
     "save-best compares validations, and eval-interval 0 means that there are none"),
    (dict(save_best="eval_loss"), "save-best keeps a checkpoint, and there is no save"),
    (dict(save_best="eval_bleu"), "use one of eval_loss, eval_exact"),
    (dict(exit_duration_in_mins=0), "exit-duration-in-mins is 0.0; it must be above 0"),
    (dict(calculate_per_token_loss=True, calculate_per_sample_loss=True), "give one of them"),
    (dict(calculate_per_token_loss=False), "give one of them"),
    (dict(ckpt_format="torch"), "ckpt-format is 'torch'; use one of torch_dist"),
])
def test_what_they_cannot_mean_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        TrainConfig.from_dict(options)


# ---- words that are no option's ------------------------------------------------------------------


def test_answers_are_of_words_that_are_no_option_and_name_options_that_are_there():
    others = {name for names in ALSO.values() for name in names}
    assert not set(ANSWERS) & (OPTIONS | others)
    for word, says in ANSWERS.items():
        named = set(re.findall(r"(?<![\w-])[a-z]+(?:-[a-z0-9]+)+", says)) - {"data-parallel"}
        known = OPTIONS | {f"no_{name}" for name in OPTIONS} | {"megatron_vl"}
        assert {name.replace("-", "_") for name in named} <= known, word
        if says.startswith("use "):
            assert says.removeprefix("use ").replace("-", "_") in OPTIONS, word


@pytest.mark.parametrize(("word", "says"), [
    ("metric-for-best-model", "use save-best"), ("early_stopping_patience", "use early-stop"),
    ("load_best_model_at_end", "give save-best"),
    ("lora-r", "use lora-rank"), ("epochs", "use num-train-epochs"),
    ("use-dora", "LoRA is the only kind of adapter"),
    ("deepspeed", "neither DeepSpeed nor FSDP"), ("zero-stage", "use-distributed-optimizer"),
    ("learning-rate", "use lr"), ("no-packing", "packing-buffer-size"),
    ("num-layers", "config.json"), ("trian-iters", "did you mean"),
])
def test_a_word_that_names_what_is_not_there_is_answered(word, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(["train", f"--{word}", "3"])
    assert end.value.code == 2
    assert says in capsys.readouterr().err
    file = tmp_path / "run.yaml"
    file.write_text(f"{word}: 3\n")
    with pytest.raises(InputError, match=says):
        load_config({}, str(file), {})
    with pytest.raises(InputError, match=says):
        train(**{f"MEGATRON_VL_{word.upper().replace('-', '_')}": "3"})


# ---- what messages call an option ----------------------------------------------------------------


def called(script) -> str:
    """What a script says that options are called."""
    (table,) = re.findall(r"^CALLED=\(\n(.*?)^\)", script.read_text(), re.M | re.S)
    return ";".join(
        "".join(one) .replace('"', "") for one in re.findall(r'("[^"]*"|[^\s"]+)("[^"]*")?', table)
    )


def positional(script) -> set[str]:
    """The words of a script's usage table."""
    text = script.read_text()
    table = text[text.index("TABLE\n") :]
    return set(re.findall(r"^ +(?:\d+|--|)  ?([A-Z]\w+|mg2hf) {2,}", table, re.M))


@pytest.mark.parametrize(("script", "left"), [
    # Of these the script speaks itself.
    (TRAINER, {"ENV", "DO", "AC", "PR", "MP_EXTRA", "MP_DRY_RUN"}),
    (FAMILY, {"SOURCE", "TARGET", "mg2hf", "PR", "MP_OVERWRITE", "MP_DRY_RUN"}),
])
def test_a_script_says_what_all_its_words_are_called(script, left):
    pairs = dict(one.split("=", 1) for one in called(script).split(";"))
    names = {name.split()[0].split("=")[0] for name in pairs.values()}
    assert positional(script) - left <= names
    parser = argparse.ArgumentParser()
    if script is TRAINER:
        from megatron_vl.cli import train as command
    else:
        command = convert
    command.add_parser(parser.add_subparsers())
    (subparsers,) = (one for one in parser._actions if one.choices)
    (flags,) = (set(one._option_string_actions) for one in subparsers.choices.values())
    assert {f"--{flag.split()[0]}" for flag in pairs} <= flags


MESSAGES = [
    ("max-padding-length 9 must be at most seq-length 8.", "PAD_LEN 9 must be at most SEQ_LEN 8."),
    ("option seq-length is 'x'; give --seq-length 5", "SEQ_LEN is 'x'; give SEQ_LEN 5"),
    ("use recompute-granularity full.", "use AC full."),
    ("add bf16; the PR bf16 stays", "add PR bf16; the PR bf16 stays"),
    ("give another --save; save often", "give another OUTPUT_BASEPATH; save often"),
    ("/data/seq-length/x.json, no-seq-length-here, seq-length.json",) * 2,
    ("sets vit-lr", "sets vit-lr"),
    ("argument --tensor-model-parallel-size/--tp: invalid", "argument TP: invalid"),
]


@pytest.mark.parametrize(("text", "reads"), MESSAGES)
def test_a_message_calls_options_as_the_script_does(text, reads):
    environ = {CALLED: called(TRAINER)}
    assert as_called(text, environ) == reads
    assert as_called(as_called(text, environ), environ) == reads
    assert as_called(text, {}) == text


def test_a_message_names_the_variable_to_whoever_set_it():
    environ = {"MEGATRON_VL_MIN_LR": "1", "MEGATRON_VL_FAILURE_FILE": "f", "MEGATRON_VL_LR": "",
               "MEGATRON_VL_DETERMINISTIC": "true"}
    said = as_called("min-lr 1.0 must be between 0 and lr 1e-05; see failure-file", environ)
    assert said == "MEGATRON_VL_MIN_LR 1.0 must be between 0 and lr 1e-05; see failure-file"
    assert as_called("no deterministic kernels", environ) == "no deterministic kernels"


@pytest.mark.parametrize(("words", "reads"), [
    (["--tp", "0"], "--tp is 0; it must be"),
    (["--tp=0"], "--tp is 0; it must be"),
    (["--tensor-model-parallel-size", "1", "--tp", "0"], "--tp is 0; it must be"),
    (["--tensor-model-parallel-size", "0"], "tensor-model-parallel-size is 0; it must be"),
    (["--tp", "x"], "argument --tp: invalid int value: 'x'"),
])
def test_a_message_calls_an_option_by_the_flag_that_was_typed(words, reads, capsys, monkeypatch):
    monkeypatch.setenv("MEGATRON_VL_TENSOR_MODEL_PARALLEL_SIZE", "4")  # which a flag beats
    monkeypatch.setattr("sys.argv", ["megatron-vl", "train", *words])
    with contextlib.suppress(SystemExit):
        assert run(["train", *words]) == 2
    assert f"megatron-vl train: {reads}" in capsys.readouterr().err


def sentences():
    """Every text of the program but what is documentation: (file, line, text)."""
    for path in sorted((ROOT / "megatron_vl").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            id(node.value) for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) \
                    and id(node) not in documentation:
                yield path.relative_to(ROOT), node.lineno, node.value


def test_no_message_names_a_scripts_words_itself():
    words = positional(TRAINER) | positional(FAMILY)
    words -= {"NPROC_PER_NODE", "TP", "PP", "CP", "SP", "ENV", "DO", "FL", "AC", "PR", "LR",
              "SOURCE", "TARGET", "mg2hf"}  # other things' names too; in brackets they are these
    assert {"MP_PP0_LAYERS", "PAD_LEN", "MODEL_SIZE", "HF_CKPT_PATH"} <= words
    found = re.compile(rf"\b(?:{'|'.join(words)}|MP_\w+)\b|\((?:ENV|DO|FL|AC|PR|LR|SP)\b")
    named = {one[0].as_posix() for one in sentences() if found.search(one[2])}
    assert named == {"megatron_vl/planner/commands.py"}, "it writes what such a script is called by"


@pytest.mark.parametrize(("changed", "variables", "says"), [
    (dict(PAD_LEN="4096"), {}, "PAD_LEN 4096 must be between 1 and SEQ_LEN 2048"),
    (dict(MIN_LR="1"), {}, "MIN_LR 1.0 must be between 0 and LR 1e-05"),
    (dict(GLOBAL_BATCH_SIZE="x"), {}, "argument GLOBAL_BATCH_SIZE"),
    (dict(PP="1"), {"MP_PP0_LAYERS": "3"}, "MP_PP0_LAYERS is 3 but with PP 1"),
])
def test_the_launcher_answers_in_its_own_words(changed, variables, says, model_dir):
    from test_shells import published

    words = published(**{"MODEL_SIZE": "auto", "AC": "sel", "PRETRAIN_CHECKPOINT_PATH": "none",
                         "TP": "1", **changed})
    done = shell(TRAINER, *words, MP_HF_PATH=str(model_dir), MP_DRY_RUN="true", **variables)
    assert done.returncode == 2 and says in done.stderr, done.stderr


def test_a_flag_may_be_written_with_underscores():
    parser = Parser()
    parser.add_argument("--save-interval")
    parser.add_argument("words", nargs="*")
    for words in (["--save_interval", "5_0"], ["--save_interval=5_0"]):
        assert parser.parse_args([*words, "--", "--save_interval"]) == argparse.Namespace(
            save_interval="5_0", words=["--save_interval"])  # behind -- words are another's
