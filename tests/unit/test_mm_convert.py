"""MindSpeed-MM's words for conversions: what they become, and what has no meaning here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_hf import assert_equal, read

from megatron_vl.cli.mm_convert import main
from megatron_vl.errors import CALLED
from megatron_vl.weights import inspect_checkpoint

CONVERTER = "Qwen2_5_VLConverter"


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    monkeypatch.setenv(CALLED, "")  # which the command sets, for its own process


def layout(llm: str, vit: str, tp: int = 1, of: str = "parallel_config") -> list[str]:
    return [f"--cfg.{of}.llm_pp_layers", llm, f"--cfg.{of}.vit_pp_layers", vit,
            f"--cfg.{of}.tp_size", str(tp)]


def mm_convert(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


SPLITS = [  # lists of language and vision layers, and what they say
    (("[1,3]", "[2,0]", 2), [[1, 3]], [[2, 0]]),
    (("[[0,4]]", "[[1,1]]", 1), [[0, 4]], [[1, 1]]),
    (("[[0,0],[1,3]]", "[[1,1],[0,0]]", 2), [[0, 0], [1, 3]], [[1, 1], [0, 0]]),
]


@pytest.mark.parametrize(("split", "llm", "vit"), SPLITS)
def test_weights_go_there_are_split_again_and_come_home(
        split, llm, vit, window_model_dir, tmp_path):
    mm, again, home = tmp_path / "mm", tmp_path / "again", tmp_path / "home"
    assert mm_convert(CONVERTER, "hf_to_mm", "--cfg.mm_dir", mm, "--cfg.hf_config.hf_dir",
                      window_model_dir, *layout(*split)) == 0
    info = inspect_checkpoint(mm)
    assert (info.layout.tp, info.split.to_dict()) == (split[2], {"llm": llm, "vit": vit})
    stage = "_000" if len(llm[0]) > 1 else ""
    assert (mm / f"release/mp_rank_00{stage}/model_optim_rng.pt").is_file()
    assert mm_convert(
        CONVERTER, "resplit", "--cfg.source_dir", mm, "--cfg.target_dir", again,
        *layout(*split, of="source_parallel_config"),
        *layout("[2,2]", "[2,0]", 2, of="target_parallel_config"),
    ) == 0
    assert mm_convert(CONVERTER, "mm_to_hf", "--cfg.mm_dir", again, "--cfg.save_hf_dir", home,
                      "--cfg.hf_config.hf_dir", window_model_dir,
                      *layout("[[2,2]]", "[[2,0]]", 2)) == 0
    assert_equal(read(home), read(window_model_dir))


LISTS = ("[1,3]", "[2,0]")
REFUSED = [  # converter, verb, layout, more words, what is said
    ("Qwen2VLConverter", "hf_to_mm", LISTS, [],
     "is of a qwen2_5_vl, and Qwen2VLConverter converts qwen2_vl; use Qwen2_5_VLConverter"),
    (CONVERTER, "hf_to_mm", ("[1,2]", "[2,0]"), [], "[[1, 2]] sums to 3 but config.json has 4"),
    (CONVERTER, "hf_to_mm", ("[1,3]", "[1,1]"), [], "reach stage 1 but language layers [1, 3]"),
    (CONVERTER, "hf_to_mm", (*LISTS, 0), [], "--cfg.parallel_config.tp_size is 0; give a whole"),
    (CONVERTER, "hf_to_mm", ("1-3", "[2,0]"), [], "--cfg.parallel_config.llm_pp_layers '1-3' is"),
    (CONVERTER, "hf_to_mm", LISTS,
     ["--cfg.common_model_config.enable_canonical_hf_struct", "true"],
     "--cfg.common_model_config.enable_canonical_hf_struct is true, but q, k and v are stored"),
    (CONVERTER, "hf_to_mm", LISTS, ["--cfg.parallel_config.vit_tp_size", "2"],
     "--cfg.parallel_config.vit_tp_size is 2, but the vision tower is cut as"),
    (CONVERTER, "hf_to_mm", LISTS, ["--cfg.save_vit_only", "true"],
     "unrecognized argument --cfg.save_vit_only"),
    (CONVERTER, "mm_to_hf", LISTS, [], "asks for a Megatron-Core checkpoint"),
    (CONVERTER, "lora_hf_to_mm", LISTS, [], "invalid choice: 'lora_hf_to_mm'"),
]


@pytest.mark.parametrize(("converter", "verb", "lists", "more", "says"), REFUSED)
def test_what_cannot_be_done_is_said_in_the_words_that_were_typed(
        converter, verb, lists, more, says, window_model_dir, tmp_path, capsys):
    target = {"hf_to_mm": ["--cfg.mm_dir", tmp_path / "out"],
              "mm_to_hf": ["--cfg.save_hf_dir", tmp_path / "out", "--cfg.mm_dir",
                           window_model_dir]}.get(verb, [])
    assert mm_convert(converter, verb, *target, "--cfg.hf_config.hf_dir", window_model_dir,
                      *layout(*lists), *more) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_laid_out_otherwise_is_named(window_model_dir, tmp_path, capsys):
    mm_convert(CONVERTER, "hf_to_mm", "--cfg.mm_dir", tmp_path / "mm", "--cfg.hf_config.hf_dir",
               window_model_dir, *layout(*LISTS))
    assert mm_convert(CONVERTER, "mm_to_hf", "--cfg.mm_dir", tmp_path / "mm", "--cfg.save_hf_dir",
                      tmp_path / "home", "--cfg.hf_config.hf_dir", window_model_dir,
                      *layout("[2,2]", "[2,0]")) == 2
    said = capsys.readouterr().err
    assert "--cfg.parallel_config says tp_size 1, llm_pp_layers [[2, 2]]" in said
    assert "is laid out as tp_size 1, llm_pp_layers [[1, 3]]" in said


def test_what_mindspeed_mm_wrote_is_named_and_a_target_is_replaced_where_asked(
    window_model_dir, tmp_path, capsys
):
    def give(verb: str, mm: Path, *words: object) -> int:
        return mm_convert(CONVERTER, verb, "--cfg.mm_dir", mm, "--cfg.hf_config.hf_dir",
                          window_model_dir, *layout("[4]", "[2]"), *words)

    for words, code in (((), 0), ((), 2), (("--overwrite",), 0)):
        assert give("hf_to_mm", tmp_path / "mm", *words) == code
    theirs = tmp_path / "theirs" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    theirs.parent.mkdir(parents=True)
    (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").write_text("release")
    names = ("text_decoder.decoder.layers.0.mlp.linear_fc2.weight", "image_encoder.x.weight")
    torch.save({"model": {name: torch.ones(2, 2) for name in names}}, theirs)
    capsys.readouterr()
    assert give("mm_to_hf", tmp_path / "theirs", "--cfg.save_hf_dir", tmp_path / "home") == 2
    assert "if MindSpeed-MM wrote it, convert it to a Hugging Face" in capsys.readouterr().err
