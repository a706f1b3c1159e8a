"""Scores are those of the published formulas; an evaluation goes on where it was, and says all that
it left out."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
from mixed_data import write_image

from megatron_vl.ask.metrics import METRICS, answer_in, edit_distance
from megatron_vl.cli.main import run

SCORES = [  # metric, given, expected, score
    ("exact", "red", "red", 1), ("exact", "Red", "red", 0),
    ("contains", "It is Red.", "red", 1), ("contains", "blue", "red", 0),
    # Biten et al.: half of the letters right is not enough.
    ("anls", "Hello", "hello", 1), ("anls", "hallo", "hello", 0.8), ("anls", "ab", "cb", 0),
    ("anls", "", "", 1), ("anls", "kitten", "sitting", 1 - 3 / 7),
    # Masry et al.: within 5%, and no other answer is near.
    ("relaxed", "95", "100", 1), ("relaxed", "94.9", "100", 0), ("relaxed", "47%", "0.48", 1),
    ("relaxed", "Yes", "yes", 1), ("relaxed", "2", "two", 0), ("relaxed", "0.01", "0", 0),
]


@pytest.mark.parametrize(("metric", "given", "expected", "score"), SCORES)
def test_a_metric_is_its_published_formula(metric, given, expected, score):
    assert METRICS[metric](given, expected) == pytest.approx(score)


def test_the_edit_distance_is_that_of_its_definition():
    def distance(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        if one[0] == other[0]:
            return distance(one[1:], other[1:])
        return 1 + min(distance(one[1:], other), distance(one, other[1:]),
                       distance(one[1:], other[1:]))

    words = ["".join(word) for size in range(4) for word in itertools.product("ab", repeat=size)]
    for one, other in itertools.product(words, repeat=2):
        assert edit_distance(one, other) == distance(one, other)


def test_reasoning_is_no_part_of_an_answer():
    assert answer_in("<think>\nred?\n</think>\n\nblue ") == "blue"


@pytest.fixture(scope="module")
def quick(model_dir, llava_dir):
    """Evaluates a few questions; the exit code."""

    def evaluate(out, *options, data=(llava_dir / "test.json",)) -> int:
        return run(["evaluate", str(model_dir), *map(str, data), "--output", str(out), "--quiet",
                    "--max-new-tokens", "3", "--batch-size", "4", "--limit", "12",
                    *map(str, options)])

    return evaluate


def test_a_resumed_evaluation_equals_an_uninterrupted_one(quick, tmp_path, capsys):
    grouped = ["--group-by", "groups"]
    assert quick(tmp_path / "whole", *grouped) == 0
    table, _ = capsys.readouterr()
    lines = (tmp_path / "whole/answers.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 12 and "colour and shape" in table
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/answers.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    assert quick(tmp_path / "cut", *grouped) == 0
    again, _ = capsys.readouterr()
    assert again.splitlines()[:-2] == table.splitlines()[:-2]  # but for the seconds and the page
    cut = (tmp_path / "cut/answers.jsonl").read_text().splitlines(keepends=True)
    assert cut[:6] == lines[:6] and sorted(cut) == sorted(lines)
    page = (tmp_path / "cut/worst.html").read_text()
    wrong = [one for one in map(json.loads, lines) if one["score"] < 1]
    assert page.count("<img alt=") == len(wrong) and "always the commonest answer" in page
    assert quick(tmp_path / "cut", *grouped, "--metric", "anls") == 2
    assert "cut holds answers for another metric (exact, not anls)" in capsys.readouterr().err


def test_datasets_of_every_kind_are_asked_and_what_cannot_be_is_counted(
    quick, wds_dir, tmp_path, capsys
):
    write_image(tmp_path / "in/b.png", (9, 9))
    (tmp_path / "in/c.png").write_bytes(b"no image")
    several = [{"from": who, "value": text} for who, text in (
        ("human", "<image>\nWhat?"), ("gpt", "a"), ("human", "Sure?"), ("gpt", "b"))]
    bad = [{"id": name, "image": f"{name}.png", "conversations": several} for name in "bcd"]
    (tmp_path / "in/some.json").write_text(json.dumps(bad))
    assert quick(tmp_path / "out", data=(wds_dir, tmp_path / "in/some.json")) == 0
    table, _ = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1] for line in table.splitlines()[1:4]}
    assert rows == {"some.json": "2", "wds": "12", "all": "14"}
    assert "not asked: 1 (unusable media), such as entry 1 of some.json: its image" in table
    assert "not asked: 1 (missing media)" in table
    made = map(json.loads, (tmp_path / "out/answers.jsonl").read_text().splitlines())
    asked = {(one["question"], one["expected"], one["turn"]) for one in made
             if one["dataset"] == "some.json" and not one["refused"]}
    assert asked == {("[image]What?", "a", 1), ("Sure?", "b", 3)}


GATES = [("0", 0, ""), ("colour and shape=1", 1, "colour and shape scores 0.000, below"),
         ("size=0.5", 2, "--at-least names 'size', but the table's rows are"),
         ("much", 2, "--at-least 'much' is no share"), ("2", 2, "--at-least is 2.0; it must be")]


def test_a_score_below_the_gate_fails(quick, tmp_path, capsys):
    for gate, code, said in GATES:
        assert quick(tmp_path / "out", "--group-by", "groups", "--at-least", gate) == code, gate
        assert said in capsys.readouterr().err


def test_a_split_and_groups_are_of_one_kind_of_data(quick, wds_dir, llava_dir, tmp_path, capsys):
    raw = llava_dir / "test.json"
    assert quick(tmp_path / "out", "--split", "val", data=(raw,)) == 2
    assert "--split is for a prepared dataset, which no DATASET" in capsys.readouterr().err
    assert quick(tmp_path / "out", "--group-by", "groups", data=(raw, wds_dir)) == 2
    assert "which the prepared dataset" in capsys.readouterr().err
    assert quick(tmp_path / "one", "--json", "test.json", data=(llava_dir,)) == 0
    assert quick(tmp_path / "out", data=(raw, raw)) == 2
    assert "test.json is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "said"), [
    (["--group-by", "groups"], "--group-by is for raw data, which no DATASET here is"),
    (["--format", "llava"], "--format is for raw data, which no DATASET here is"),
    (["--split", "test"], "has nothing in its split 'test'"),
    (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
])
def test_options_of_an_evaluation_that_cannot_be_used(options, said, quick, wds_dir, tmp_path,
                                                      capsys):
    assert quick(tmp_path / "out", *options, data=(wds_dir,)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
