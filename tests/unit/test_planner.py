"""`megatron-vl plan`: what it recommends fits by a dry run's numbers; what cannot be is refused."""

from __future__ import annotations

import json
import re
from itertools import product

import pytest
import yaml
from test_docs import CODE, tables
from true_sizes import write

from megatron_vl.cli.main import run
from megatron_vl.planner.balance import balanced
from megatron_vl.planner.cards import CARDS, read_card
from megatron_vl.planner.microbatch import Microbatch
from megatron_vl.planner.search import Question
from megatron_vl.planner.step_time import chunk_work, parts, step_time
from megatron_vl.training.memory import rank_memory

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The directory of a published size's config.json."""
    root = tmp_path_factory.mktemp("published")
    return lambda size, family="qwen2_vl": write(root / f"{family}-{size}", size, family)


def said(capsys, *words: object, code: int = 0) -> str:
    assert run(list(map(str, words))) == code
    out, err = capsys.readouterr()
    return err if code else out


@pytest.mark.parametrize(("size", "family", "gpus", "words"), [
    ("2B", "qwen2_vl", 1, []),
    ("7B", "qwen2_vl", 8, ["--seq-length", 4096]),
    ("72B", "qwen2_vl", 64, []),
    ("72B", "qwen2_5_vl", 2, ["--lora-rank", 16, "--quantize-base", "nf4", "--gpu", "h200"]),
    ("30B-A3B", "qwen3_vl_moe", 8, ["--gpu", "h200", "--grad-reduce-in-bf16"]),
])
def test_the_first_choice_passes_a_dry_run_with_the_same_numbers(
    model, tmp_path, capsys, size, family, gpus, words
):
    file, hf = tmp_path / "run.yaml", model(size, family)
    text = said(capsys, "plan", hf, "--gpus", gpus, "--out", file, *words)
    nodes = ["--nnodes", -(-gpus // 8), "--nproc-per-node", min(gpus, 8)]
    dry = said(capsys, "train", "--dry-run", "--config", file, "--hf-config", hf,
               "--train-data-path", "DATA", *nodes)
    first = re.search(r"^1 +(\S+) +.* ([\d.]+) +(\d+)%$", text, re.M)
    worst = max(re.findall(r"^on stage \d+ .* (\d+\.\d\d)$", dry, re.M), key=float)
    assert f", {first[1]}: " in dry and f"{float(worst):.1f}" == f"{float(first[2]):.1f}"
    assert re.search(rf"^stage \d+ .* {worst} +\d+\.\d\d$", text, re.M) and int(first[3]) <= 100
    assert "were not measured on these cards" in " ".join(text.split())
    # The command says what the file says.
    line = re.search(r"^megatron-vl train .*", text, re.M)[0]
    flags = re.findall(r"--([a-z0-9-]+)", line.partition("--bf16")[2])
    assert {"bf16", *flags} == set(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(("words", "told"), [
    (["--gpus", 1, "--gpu", "24g"], [r"TP1xPP1xDP1 .* comes closest", r"--gpus 16 would fit",
                                     r"--lora-rank 16"]),
    (["--gpus", 12], ["--gpus 12 is not a multiple of the 8 cards of a node"]),
    (["--gpus", 0], ["--gpus is 0"]),
    (["--gpus", 1, "--gpu", "h300"], ["--gpu h300 is no card .* did you mean h200?"]),
    (["--gpus", 8, "--seq-length", 0], ["seq-length is 0"]),
    (["--gpus", 8, "--quantize-base", "nf4"], ["quantize-base is about an adapter"]),
    (["--gpus", 8, "--out", "plan.txt"], ["--out plan.txt ends in .txt"]),
])
def test_what_cannot_be_is_refused_in_a_sentence(model, capsys, words, told):
    text = said(capsys, "plan", model("7B"), *words, code=2)
    assert text.count("\n") == 1
    for one in told:
        assert re.search(one, text), text


def test_a_file_replaces_numbers_of_a_card(tmp_path):
    file = tmp_path / "card.json"
    file.write_text(json.dumps({"like": "h200", "memory_gb": 100, "usable_memory": 0.5}))
    card = read_card(str(file))
    assert card.room == 50 * 10**9 and card.peak_tflops == CARDS["h200"].peak_tflops
    for wrong in ({"like": "h200", "memory": 1}, {"like": "x"}, {"memory_gb": 1}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="--gpu .*card.json"):
            read_card(str(file))


def test_the_page_has_the_numbers_of_every_card_and_share():
    cards, shares = (next(one for one in tables("docs/planning.md") if one[0][0] == head)
                     for head in ("`--gpu`", "share"))
    assert [(row[0].split("`")[1], *map(float, row[1:])) for row in cards[1:]] == [
        (name, card.memory_gb, card.peak_tflops, card.memory_tb_s, card.node_gb_s,
         card.network_gb_s) for name, card in CARDS.items()
    ]
    card = CARDS["h200"]
    told = {name: float(value) for row in shares[1:]
            for name, value in zip(CODE.findall(row[0]), row[1].split(", "), strict=True)}
    assert told == {name: getattr(card, name) for name in told} and len(told) == 8


@pytest.mark.parametrize(("row_length", "seconds"), [(8192, 3.81), (4096, 2.40)])
def test_the_measured_steps_of_the_h200_are_predicted(model, row_length, seconds):
    """Of docs/benchmarks.md: 2B, 8 packed rows, three quarters images of about 400 tokens."""
    question = Question(hf_dir=model("2B"), gpus=1, per_node=1, card=CARDS["h200"],
                        options={"global_batch_size": 8, "seq_length": row_length},
                        image_tokens=400)
    samples = [560] * (row_length // 560)
    samples.append(row_length - sum(samples))
    plan = question.plan()
    batch = Microbatch.of(plan.spec, lengths=samples, trained=row_length,
                          images={(1, 40, 40): 0.75 * row_length / 400})
    work = chunk_work(plan, parts(plan, question.card, batch, per_node=1, chunks=1), question.card)
    found = step_time(plan, work, [rank_memory(plan, 0)], question.card, batch, per_node=1)
    assert found.seconds == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize(("layers", "layer", "extra"), [
    (7, 1.0, [[3.5, 0, 1.2]]), (6, 2.0, [[0, 0.5]]), (5, 1.0, [[9, 0, 0]]), (8, 1.0, [[0, 0]] * 2),
])
def test_no_other_split_has_a_less_busy_stage(layers, layer, extra):
    def busiest(rows) -> float:
        return max(sum(row[stage] * layer + more[stage] for row, more in zip(rows, extra,
                                                                           strict=True))
                   for stage in range(len(extra[0])))

    stages, counts = len(extra[0]), range(layers + 1)
    others = [
        [flat[at : at + stages] for at in range(0, len(flat), stages)]
        for flat in product(counts, repeat=stages * len(extra))
        if sum(flat) == layers and all(flat[1:])
    ]
    found = balanced(layers, layer, extra)
    assert sum(map(sum, found)) == layers
    assert busiest(found) == pytest.approx(min(map(busiest, others)))
