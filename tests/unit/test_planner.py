"""`megatron-vl plan`: what it recommends fits by a dry run's numbers; what cannot be is refused."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from itertools import product

import pytest
import yaml
from published_times import FIGURES, MISSED, predicted
from test_docs import CODE, tables
from true_sizes import write

from megatron_vl.cli.main import run
from megatron_vl.cli.plan import CARD_NAMES
from megatron_vl.models.registry import load_spec
from megatron_vl.parallel import Layout
from megatron_vl.planner.balance import balanced
from megatron_vl.planner.cards import CARDS, calibrated, read_card
from megatron_vl.planner.microbatch import Microbatch
from megatron_vl.planner.rates import message_seconds, rate_at
from megatron_vl.planner.schedule import Pipeline
from megatron_vl.planner.search import Choice, Question, _splits, parts_of, search
from megatron_vl.planner.space import options_of
from megatron_vl.planner.step_time import StepTime, chunk_work, predict
from megatron_vl.planner.work import Work
from megatron_vl.training.rows import DataRows, RowSample

GIB = 2**30
# What the H200 of docs/benchmarks.md reached in a run with torch's own attention and layers.
WITHOUT_TRANSFORMER_ENGINE = {"attention_share": 0.2, "operation_host_us": 47}


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
    ("7B", "qwen2_vl", 1, []),  # with its optimizer in host memory
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
    assert f", {first[1]}: " in dry and float(worst) == pytest.approx(float(first[2]), abs=0.056)
    assert re.search(rf"^stage \d+ .* {worst} +\d+\.\d\d$", text, re.M) and int(first[3]) <= 100
    assert "were not measured on these cards" in " ".join(text.split())
    # The command says what the file says.
    line = re.search(r"^megatron-vl train .*", text, re.M)[0]
    flags = re.findall(r"--([a-z0-9-]+)", line.partition("--bf16")[2])
    assert {"bf16", *flags} == set(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(("words", "told"), [
    (["--gpus", 1, "--gpu", "24g"], [r"TP1xPP1xDP1 .* comes closest", r"--gpus 4 would fit",
                                     r"--lora-rank 16 or"]),
    (["--gpus", 1, "--gpu", "16g"], [r"--lora-rank 16 --quantize-base nf4 or --gpus \d+ would"]),
    (["--gpus", 1, "--gpu", "16g", "--lora-rank", 8], [r"; --quantize-base nf4 or --gpus 2 would"]),
    (["--gpus", 12], ["--gpus 12 is not a multiple of the 8 cards of a node"]),
    (["--gpus", 0], ["--gpus is 0"]),
    (["--gpus", 1, "--gpu", "h300"], ["--gpu h300 is no card .* did you mean h200?"]),
    (["--gpus", 8, "--seq-length", 0], ["seq-length is 0"]),
    (["--gpus", 8, "--quantize-base", "nf4"], ["quantize-base is about an adapter"]),
    (["--gpus", 8, "--out", "plan.txt"], ["--out plan.txt ends in .txt"]),
    (["--gpus", 8, "--page", "plan.txt"], ["--page plan.txt ends in .txt"]),
    (["--gpus", 8, "--out", "README.md/x.yaml"], ["--out README.md/x.yaml cannot .* is a file"]),
    (["--gpus", 8, "--page", "README.md/a/x"], ["--page README.md/a/x.html cannot .* is a file"]),
    (["--gpus", 8, "--images-per-sample", 2], ["need one another; give both"]),
    (["--gpus", 8, "--dataset", "x", "--image-tokens", 9], ["both say what rows hold"]),
    (["--gpus", 8, "--dataset", "no/such"], ["no/such"]),
    (["--gpus", 8, "--dataset", " "], ["--dataset is empty; give prepared data"]),
    (["--gpus", 8, "--text-tokens", 100_000], ["a sample of 100000 tokens fits no row; raise"]),
])
def test_what_cannot_be_is_refused_in_a_sentence(model, capsys, words, told):
    text = said(capsys, "plan", model("7B"), *words, code=2)
    assert text.count("\n") == 1
    for one in told:
        assert re.search(one, text), text


@pytest.mark.parametrize("size", ["9x", "0x9", "9x9x9", "9" * 5000 + "x9"], ids=len)
def test_what_is_no_size_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        run(["plan", "HF", "--gpus", "8", "--image-size", size])
    assert "is no size; write 1280x720 pixels" in capsys.readouterr().err


def test_times_are_those_of_the_rows_that_lint_forecasts(hf_dir, mixed_dir, tmp_path, capsys):
    words = ["--seq-length", 1024, "--max-patches-per-row", 3000]
    text = said(capsys, "plan", hf_dir, "--gpus", 2, "--dataset", mixed_dir, *words)
    said(capsys, "lint", mixed_dir, "--model", hf_dir, "--out", tmp_path / "lint", *words)
    numbers = json.loads((tmp_path / "lint" / "lint.json").read_text())
    row = next(one for one in numbers["forecast"]
               if (one["seq_length"], one["max_patches"]) == (1024, 3000))
    assert 0.2 < row["fill"] < 0.999 and row["patches_max"] > 0
    told = (f"{row['samples']:.1f} samples, {row['fill']:.1%} full, ",
            f"{row['patches_mean']:,.0f} patches ({row['patches_max']:,} in the largest row)")
    assert all(one in text for one in told), (text, told)
    assert "memory is of full rows with 3,000 patches" in text
    assert f"--train-data-path {mixed_dir}" in text
    # What every second brings: tokens and samples of as many rows.
    first = re.search(r"^1 +\S+ +\d+ +\S+ +([\d,]+) +[\d,]+ +([\d,.]+)", text, re.M)
    tokens, samples = (float(one.replace(",", "")) for one in first.groups())
    assert tokens / samples == pytest.approx(row["fill"] * 1024 / row["samples"], rel=0.01)


@pytest.mark.parametrize(("words", "told"), [
    # 56 x 84 pixels are 4 x 6 patches and 6 tokens, with the two marks 8; the row holds 2048.
    (["--images-per-sample", 2, "--image-size", "84x56", "--text-tokens", 100],
     "17.0 samples, 96.3% full, 86.2% of the tokens trained, 34.0 images, 816 patches (816 "),
    (["--images-per-sample", 0], "8.0 samples, 100.0% full, 100.0% of the tokens trained, 0.0 im"),
    (["--images-per-sample", 2, "--image-size", "84x56", "--max-patches-per-row", 100],
     "2.0 samples, 26.6% full, 94.1% of the tokens trained, 4.0 images, 96 patches (96 "),
])
def test_samples_that_are_described_fill_rows(hf_dir, capsys, words, told):
    assert told in said(capsys, "plan", hf_dir, "--gpus", 1, *words)


def test_rows_that_differ_are_simulated_one_by_one(model):
    images, text = (RowSample(tokens=2048, trained=2048, grids=((1, 64, 64),) * number)
                    for number in (2, 0))
    question = Question(
        hf_dir=model("2B"), gpus=2, per_node=2, card=CARDS["h100-80g"],
        options={"global_batch_size": 8, "seq_length": 2048},
        data=DataRows(rows=((images,), (text,)) * 8, source="pages"))
    plan = question.plan(pipeline_model_parallel_size=2)
    (batches,) = question.microbatches(plan)
    assert [one.images for one in batches] == [2, 0] * 4
    apart, alike = (predict(plan, question.card, those, per_node=2).seconds
                    for those in (batches, [question.microbatch(plan)]))
    assert apart > 1.02 * alike
    # What they need, to which MFU refers, is that of all rows, though a step takes fewer.
    third = replace(question, data=DataRows(rows=((images,), (text,), (text,)) * 4, source="books"))
    needed = search(third).best[0].step.flops
    assert needed == pytest.approx(8 * third.row.needed)
    # Two replicas have rows of their own, two at a time.
    replicas = question.microbatches(question.plan(micro_batch_size=2))
    assert [[one.images for one in batches] for batches in replicas] == [[2, 2], [2, 2]]


def test_rows_of_less_work_take_less_time(hf_dir, capsys):
    def tokens_a_second(*words: object) -> float:
        text = said(capsys, "plan", hf_dir, "--gpus", 1, *words)
        return float(re.search(r"^1 +\S+ +\d+ +\S+ +([\d,]+)", text, re.M)[1].replace(",", ""))

    assert tokens_a_second("--images-per-sample", 0) >= tokens_a_second()


def test_a_tower_that_takes_longer_than_a_stage_lies_on_several(model):
    question = Question(hf_dir=model("72B"), gpus=64, per_node=8, card=CARDS["h100-80g"],
                        options={"global_batch_size": 64, "seq_length": 2048})
    layout = Layout(tp=2, pp=16, dp=2, sequence_parallel=True)
    whole, over = _splits(question, load_spec(question.hf_dir), layout, options_of(layout))
    busiest = {}
    for name, split in (("whole", whole), ("over", over)):
        plan = question.plan(**options_of(layout), **split)
        work = chunk_work(plan, parts_of(question, plan), question.card)
        busiest[name] = max(sum(row[stage].seconds for row in work) for stage in range(16))
    assert "vit_pp_layers" not in whole and busiest["over"] < busiest["whole"]


def test_a_split_balances_what_recompute_adds(model):
    question = Question(hf_dir=model("72B"), gpus=64, per_node=1, card=CARDS["h100-80g"],
                        options={"global_batch_size": 64, "seq_length": 2048})
    layout, level = Layout(pp=8, dp=8), {"vit_recompute_granularity": "full"}
    options, busiest = options_of(layout), []
    for more in ({}, level):
        split = _splits(question, load_spec(question.hf_dir), layout, options, more)[0]
        plan = question.plan(**options, **split, **level)
        work = chunk_work(plan, parts_of(question, plan), question.card)
        busiest.append(max(row.seconds for row in work[0]))
    assert busiest[1] < 0.95 * busiest[0]


def test_no_way_to_run_is_told_twice(model, monkeypatch):
    monkeypatch.setattr("megatron_vl.planner.search.BEST", 10**6)
    best = search(Question(hf_dir=model("7B"), gpus=8, per_node=8, card=CARDS["a100-40g"],
                           options={"global_batch_size": 64, "seq_length": 2048})).best
    assert len(best) > 100 and len({frozenset(one.options.items()) for one in best}) == len(best)


def test_a_page_draws_every_stage_and_all_of_the_layouts(model, tmp_path, capsys):
    file = tmp_path / "plan.html"
    text = said(capsys, "plan", model("7B"), "--gpus", 8, "--page", file, "--global-batch-size",
                2048)
    page = file.read_text()
    stages = len(re.findall(r"^stage \d+ ", text.partition("GiB of a rank")[0], re.M))
    timeline, memory = (re.search(f'aria-label="{name}".*?</svg>', page, re.S)[0] for name in (
        "the pipeline of a step", "memory of every stage"))
    for drawing in (timeline, memory):
        assert re.findall(r">stage (\d+)<", drawing) == list(map(str, range(stages)))
        drawn = [(float(x), float(x) + float(width)) for x, width in
                 re.findall(r"M([\d.]+) [\d.]+h([\d.]+)v", drawing)]
        assert drawn and all(62 <= left < right <= 1048.2 for left, right in drawn)
    assert "s are left out" in page  # of so many microbatches the middle
    assert ("are microbatches" in page) == ('class="on' in timeline)
    assert page.count("<circle") == 10 and "<script" not in page
    command = re.search(r"^megatron-vl train .*", text, re.M)[0]
    assert html.escape(command, quote=True) in page


def test_a_file_replaces_numbers_of_a_card(tmp_path):
    file = tmp_path / "card.json"
    file.write_text(json.dumps({"like": "h200", "memory_gb": 100, "usable_memory": 0.5}))
    card = read_card(str(file))
    assert card.room == 50 * 10**9 and card.peak_tflops == CARDS["h200"].peak_tflops
    for wrong in ({"like": "h200", "memory": 1}, {"like": "x"}, {"memory_gb": 1}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="--gpu .*card.json"):
            read_card(str(file))


def test_a_rate_between_two_measured_sizes_is_interpolated():
    points = ((1.0, 10.0), (100.0, 30.0), (1000.0, 20.0))
    for size, rate in ((0.1, 10), (1, 10), (10, 20), (100, 30), (100 * 10**0.5, 25), (1e6, 20)):
        assert rate_at(points, size) == pytest.approx(rate)


def test_a_message_between_two_measured_sizes_has_the_latency_of_both():
    latency, rate = 2e-5, 50  # seconds, GB/s
    points = tuple((size, size / 1e3 / (latency + size / 1e3 / rate)) for size in (0.1, 1.0, 10.0))
    for size in (0.1, 0.3, 1, 7, 10):
        assert message_seconds(points, size) == pytest.approx(latency + size / 1e3 / rate)
    assert message_seconds(points, 0.01) == message_seconds(points, 0.1)
    assert message_seconds(points, 100) == pytest.approx(10 * message_seconds(points, 10))


def test_what_was_measured_takes_the_place_of_the_shares(tmp_path):
    file, card = tmp_path / "gpu.json", CARDS["h100-80g"]
    file.write_text(json.dumps({"memory_share": 0.6, "operation_host_us": 5, "rates": {
        "products": [[1, 100], [100, 500]], "attention_backward": [[1024, 250]],
        "node": [[1, 50], [100, 300]], "network": {"send": [[1, 5]]}}}))
    found = calibrated(card, file)
    assert found.name == card.name and found.room == card.room
    # Ten products of 10^10 FLOPs each: between the two measured sizes.
    assert found.matrix_seconds(1e11, products=10) == pytest.approx(1e11 / 300e12)
    assert found.attention_seconds(1e12, length=99, backward=True) == pytest.approx(1 / 250)
    assert found.attention_seconds(1e12, length=99) == card.attention_seconds(1e12, length=99)
    sent, away = dict(nbytes=1e8, messages=100), dict(within_node=False, kind="all_gather")
    for kind in ("all_gather", "send"):
        assert found.link_seconds(**sent, within_node=True, kind=kind) == pytest.approx(1e8 / 50e9)
    assert found.link_seconds(**sent, **away) == card.link_seconds(**sent, **away)
    assert found.link_seconds(**sent, **away | dict(kind="send")) == pytest.approx(1e8 / 5e9)
    assert found.memory_seconds(1e9) < card.memory_seconds(1e9)


@pytest.mark.parametrize(("written", "told"), [
    ({"rates": {"products": [[2, 1], [1, 1]]}}, "the sizes of rates.products are .2.0, 1.0.; let"),
    ({"rates": {"products": []}}, "rates.products is ..: it must have at least 1 item, not 0"),
    ({"rates": {"products": [[1, 0]]}}, "rates.products.0.1 is 0"),
    ({"rates": {"node": {"send": [[2, 1], [1, 1]]}}}, "the sizes of rates.node.send are .2.0, 1"),
    ({"rates": {"network": {"sends": [[1, 1]]}}}, "rates.network.sends is .*: no key of this name"),
    ({"rates": {"matmul": [[1, 1]]}}, "rates.matmul is .*: no key of this name is known"),
    ({"name": "a\nb"}, "name is .*: it must be words of one line"),
    ({"like": "h200"}, "has like, but --gpu says which card; leave it out"),
    ({"memory_share": 2}, "memory_share is 2"),
])
def test_a_file_of_rates_that_cannot_be_used_is_refused(model, tmp_path, capsys, written, told):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(written))
    text = said(capsys, "plan", model("2B"), "--gpus", 1, "--calibrate", file, code=2)
    assert text.count("\n") == 1 and re.search(rf"--calibrate .*gpu.json.*{told}", text), text


def test_of_steps_that_are_alike_the_one_that_waits_less_comes_first(model):
    plan = Question(hf_dir=model("2B"), gpus=1, per_node=1, card=CARDS["h200"], options={},
                    image_tokens=1).plan()

    def choice(seconds: float, busy: float) -> Choice:
        pipeline = Pipeline(ends=(seconds,), busy=(busy,), timeline=())
        step = StepTime(pipeline=pipeline, seconds=seconds, ends=(seconds,), parts=(), works=(),
                        flops=1)
        return Choice(options={}, plan=plan, stages=(), step=step)

    waits, works, slow = choice(1.0, 0.5), choice(1.002, 0.9), choice(1.1, 1.1)
    assert sorted((slow, waits, works), key=Choice.order) == [works, waits, slow]


def test_the_host_is_waited_for_only_where_it_is_slower_or_does_not_run_ahead():
    work = Work(forward=3, backward=4, forward_host=1, backward_host=5)
    ahead, beside = (work.together(runs_ahead=ahead) for ahead in (True, False))
    assert (ahead.forward, ahead.backward) == (3, 5) and work.seconds == 8
    assert (beside.forward, beside.backward) == (4, 9)


def test_the_page_has_the_numbers_of_every_card_and_share():
    cards, shares = (next(one for one in tables("docs/planning.md") if one[0][0] == head)
                     for head in ("`--gpu`", "share"))
    assert [(row[0].split("`")[1], *map(float, row[1:])) for row in cards[1:]] == [
        (name, card.memory_gb, card.peak_tflops, card.memory_tb_s, card.node_gb_s,
         card.network_gb_s) for name, card in CARDS.items()
    ]
    assert f"{', '.join(CARDS)}, or a FILE.json" == CARD_NAMES
    card = CARDS["h100-80g"]
    told = {name: float(value) for row in shares[1:]
            for name, value in zip(CODE.findall(row[0]), row[1].split(", "), strict=True)}
    assert told == {name: getattr(card, name) for name in told} and len(told) == 9


@pytest.mark.parametrize(("row_length", "seconds"), [(8192, 3.81), (4096, 2.40)])
def test_the_measured_steps_of_the_h200_are_predicted(model, row_length, seconds):
    """Of docs/benchmarks.md: 2B, 8 packed rows, three quarters images of about 400 tokens."""
    card = replace(CARDS["h200"], **WITHOUT_TRANSFORMER_ENGINE)
    question = Question(hf_dir=model("2B"), gpus=1, per_node=1, card=card,
                        options={"global_batch_size": 8, "seq_length": row_length},
                        image_tokens=400)
    samples = [560] * (row_length // 560)
    samples.append(row_length - sum(samples))
    plan = question.plan()
    batch = Microbatch.of(plan, lengths=samples, trained=row_length,
                          images={(1, 40, 40): 0.75 * row_length / 400})
    found = predict(plan, card, [batch], per_node=1)
    assert found.seconds == pytest.approx(seconds, rel=0.1)


def test_the_page_has_the_published_steps_beside_what_is_predicted(tmp_path):
    table = next(one for one in tables("docs/planning.md") if one[0][0] == "published")
    told = {row[0]: tuple(map(float, row[-3:])) for row in table[1:]}
    ratios = {}
    for name, one in FIGURES.items():
        seconds = predicted(one, tmp_path / name).seconds
        ratios[name] = seconds / one.seconds
        assert told.pop(name) == (round(one.seconds, 2), round(seconds, 2),
                                  round(ratios[name], 2)), name
    assert not told
    missed = {name for name, ratio in ratios.items() if not 0.8 <= ratio <= 1.2}
    assert missed == set(MISSED)


def test_a_model_without_a_tower_is_planned_over_stages(text_model_dir, capsys):
    text = said(capsys, "plan", text_model_dir, "--gpus", 4, "--text-tokens", 1000)
    assert re.search(r"^\d+ +\S*PP2\S* ", text, re.M) and "2.0 samples, 97.7% full" in text


def test_samples_that_a_text_model_cannot_take_are_counted_by_reason(
    text_model_dir, mixed_dir, capsys
):
    text = said(capsys, "plan", text_model_dir, "--gpus", 1, "--dataset", mixed_dir)
    lost, number, why = re.search(r"and (\d+) cannot be used \(not served: (\d+), as (.+)\)",
                                  text).groups()
    assert lost == number and "text" in why, why


def test_more_rows_are_named_where_stages_wait(model, capsys):
    words = ["plan", model("72B"), "--gpus", 64, "--gpus-per-node", 1, "--global-batch-size", 64]
    found = re.search(r"the first waits (\d+)% .*--global-batch-size 128", said(
        capsys, *words))
    assert int(found[1]) >= 15


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
