"""MindSpeed-MM's finetuning script and files: what they become, and one run of them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from commands import ROOT, shell
from test_clusters import free_port
from true_sizes import PARAMETERS, write

from megatron_vl.cli.mm_train import main
from megatron_vl.errors import CALLED
from megatron_vl.models.registry import read_config_json
from megatron_vl.training.options.mindspeed import translated

FOLDER = ROOT / "examples/qwen2.5vl"
SCRIPT = "examples/qwen2.5vl/finetune_qwen2_5_vl_7b.sh"
MEDIA, BASIC, ATTR = (f"dataset_param.{one}" for one in
                      ("preprocess_parameters", "basic_parameters", "attr"))
VISION, PROJECTOR = "image_encoder.vision_encoder", "image_encoder.vision_projector"


def put(values: dict, changes: dict) -> dict:
    for key, value in changes.items():
        *tables, last = key.split(".")
        table = values
        for one in tables:
            table = table.setdefault(one, {})
        table[last] = value
    return values


@pytest.fixture
def files(tmp_path, monkeypatch, window_model_dir, llava_dir):
    """Writes data.json and model.json of the example, for the tiny model and easy-VQA's images."""
    monkeypatch.setenv(CALLED, "")  # which the command sets, for its own process

    def make(data: dict | None = None, model: dict | None = None) -> list[str]:
        tiny = {
            f"{MEDIA}.model_name_or_path": str(window_model_dir),
            f"{BASIC}.dataset": str(llava_dir / "train.json"),
            f"{BASIC}.dataset_dir": str(llava_dir), f"{BASIC}.cache_dir": str(tmp_path / "cache"),
            f"{BASIC}.preprocessing_num_workers": 1, f"{BASIC}.preprocessing_batch_size": 9,
            "dataset_param.attr": {"images": "image"},
        }  # fmt: skip
        layers = {f"{VISION}.num_layers": 2, f"{VISION}.pipeline_num_layers": [1, 1],
                  "text_decoder.num_layers": 4, "text_decoder.pipeline_num_layers": [0, 4]}
        for name, changes in (("data", tiny | (data or {})), ("model", layers | (model or {}))):
            values = put(json.loads((FOLDER / f"{name}_7b.json").read_text()), changes)
            (tmp_path / f"{name}.json").write_text(json.dumps(values))
        return ["--mm-data", str(tmp_path / "data.json"), "--mm-model",
                str(tmp_path / "model.json")]

    return make


def options(words: list[str]) -> dict[str, str]:
    """The last value of every flag; "" of one without."""
    pairs = zip(words, [*words[1:], "--"], strict=True)
    return {flag: "" if value.startswith("--") else value for flag, value in pairs
            if flag.startswith("--")}


BECOMES = [  # of data.json, of model.json, and what is among the options
    ({}, {}, {"--freeze-vit": "", "--freeze-merger": "", "--pp-layers": "[0, 4]",
              "--vit-pp-layers": "[1, 1]", "--image-max-pixels": "262144",
              "--image-min-pixels": "1", "--video-max-pixels": "16384", "--video-fps": "2",
              "--video-maxlen": "64", "--eval-interval": "0", "--min-lr": "0",
              "--packing-buffer-size": "0", "--no-use-distributed-optimizer": "",
              "--log-interval": "1"}),
    # What MindSpeed-MM takes where a key is missing.
    ({f"{MEDIA}.image_max_pixels": None, f"{MEDIA}.image_min_pixels": None,
      f"{MEDIA}.video_max_pixels": None, f"{MEDIA}.video_min_pixels": None,
      f"{MEDIA}.video_maxlen": None}, {f"{VISION}.freeze": None, f"{PROJECTOR}.freeze": None},
     {"--image-max-pixels": "589824", "--image-min-pixels": "1024", "--video-max-pixels": "65536",
      "--video-min-pixels": "256", "--video-maxlen": "128", "--freeze-vit": ""}),
    ({f"{BASIC}.train_on_prompt": True, f"{BASIC}.mask_history": True, f"{BASIC}.max_samples": 5},
     {"text_decoder.recompute_granularity": "full", "text_decoder.recompute_method": "block",
      "text_decoder.recompute_num_layers": 2},
     {"--train-on-prompt": "", "--mask-history": "", "--max-samples": "5",
      "--recompute-granularity": "full", "--recompute-method": "block",
      "--recompute-num-layers": "2", "--vit-recompute-granularity": "none"}),
    ({}, {f"{VISION}.pipeline_num_layers": [[1, 1], [0, 0]],
          "text_decoder.pipeline_num_layers": [[0, 0], [1, 3]]},
     {"--num-virtual-stages-per-pipeline-rank": "2", "--vit-pp-layers": "[[1, 1], [0, 0]]"}),
]


@pytest.mark.parametrize(("data", "model", "among"), BECOMES)
def test_files_become_options(data, model, among, files):
    _, words = translated(files(data, model))
    assert among.items() <= options(words).items()


def test_raw_data_are_prepared_once_and_again_when_they_are_read_otherwise(files, tmp_path):
    (job,), words = translated(files({f"{BASIC}.val_rate": 0.25}))
    assert options(job)["--split"] == "0.75,0.25,0" and "--eval-interval" not in words
    assert options(words)["--train-data-path"] == job[2]
    Path(job[2]).mkdir(parents=True)
    assert translated(files({f"{BASIC}.val_rate": 0.25}))[0] == []
    (other,), _ = translated(files())
    assert other[2] != job[2] and options(other)["--columns"] == "images=image"


REFUSED = [  # of data.json, of model.json, more words, what is said
    ({f"{BASIC}.cutoff_len": 9}, {}, [], "cutoff_len is 9, but --seq-length says it"),
    ({f"{MEDIA}.video_fps": "x"}, {}, [], f"{MEDIA}.video_fps is 'x'"),
    ({f"{BASIC}.dataset": "no.json"}, {}, [], "basic_parameters names no.json, which is not there"),
    ({}, {"text_decoder.num_layers": 5}, [], "num_layers is 5, but config.json says 4"),
    ({}, {"text_decoder.canonical_model": True}, [], "canonical_model is True, but q, k and v"),
    ({}, {f"{VISION}.hidden_dropout": 0.1}, [], "hidden_dropout is 0.1, but these models are"),
]


@pytest.mark.parametrize(("data", "model", "more", "says"), REFUSED)
def test_what_has_another_meaning_is_refused(data, model, more, says, files, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*files(data, model), *more])
    assert ended.value.code == 2 and says in capsys.readouterr().err


SEVERAL = [  # arguments and variables that tell of two nodes
    (["--nnodes", "2"], {}), (["--nnodes=2"], {}),
    ([], {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}),
]


@pytest.mark.parametrize(("more", "variables"), SEVERAL, ids=str)
def test_several_nodes_do_not_prepare_raw_data(more, variables, files, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main([*files(), *more])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "before you start several nodes, run on one of them" in said


def test_the_name_of_a_template_is_noted(files, capsys):
    translated(files({f"{BASIC}.template": "llama3"}))
    assert "template llama3: the chat template is the tokenizer's own" in capsys.readouterr().out


def test_the_script_lays_out_7b_at_its_true_size(files, wds_dir, tmp_path):
    model = write(tmp_path / "7B", "7B", "qwen2_5_vl")
    _, data, *_ = files({f"{MEDIA}.model_name_or_path": str(model),
                         f"{BASIC}.dataset": str(wds_dir)})
    done = shell(SCRIPT, "--dry-run", MM_DATA=data, LOAD_PATH=tmp_path / "mm",
                 SAVE_PATH=tmp_path / "save")
    assert done.code == 0, done.text
    assert f"the model has {PARAMETERS['qwen2_5_vl']['7B']:,} parameters" in done.out
    assert "TP1xPP2xDP4" in done.out and "note: --use-flash-attn: see attention-backend" in done.out
    assert "no meaning here: dataset_param.basic_parameters.dataset_dir" in done.out, "of shards"


def test_a_stage_of_frozen_layers_alone_trains_without_another_flag(
    files, window_model_dir, llava_dir, tmp_path
):
    """As MindSpeed-MM's [30,2,0,0] and [0,11,10,7]: the tower ends on a stage after the first."""
    _, data, _, model = files({f"{BASIC}.val_dataset": str(llava_dir / "train.json")})
    done = shell(
        SCRIPT, *shlex.split("--train-iters 2 --num-workers 0 --enable-dummy-optimizer "
                             "--eval-interval 2 --eval-iters 1"),
        NPUS_PER_NODE=2, GRAD_ACC_STEP=2, MM_DATA=data, MM_MODEL=model,
        LOAD_PATH=window_model_dir, SAVE_PATH=tmp_path / "save", MASTER_PORT=free_port(),
    )
    assert done.code == 0, done.text
    assert "llm 0-4, vision 1-1" in done.out and "iteration 2/2" in done.out
    assert "validation at iteration 2" in done.out, "on val_dataset"
    assert "Average tokens per sample" in done.out, "--log-tps"
    assert read_config_json(tmp_path / "save")["model_type"] == "qwen2_5_vl"
