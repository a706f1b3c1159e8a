"""Runs as pictures and as a page: what is on it, and that it obeys nobody's text."""

import base64
import json
import math
import re

import pytest
from test_full_disk import fill

from megatron_vl.cli.main import run
from megatron_vl.errors import InputError
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.reporting.experts_map import load_map
from megatron_vl.training.reporting.history import names_of, read_history
from megatron_vl.training.reporting.page import write_page
from megatron_vl.training.reporting.report import COLORS, plot_runs

EVIL = "<script>alert('x')</script>"


def write_run(folder, *, save=None, loss=3.0, steps=4):
    """A run's metrics, as training writes them."""
    options = TrainConfig.from_dict({"save": save and str(save), "train_data_path": EVIL})
    start = {
        "kind": "run", "time": 0.0, "options": options.to_dict(), "versions": {"torch": "2"},
        "model_type": "qwen2_vl", "tied": True, "layout": {"tp": 2, "pp": 2, "dp": 1},
        "split": {"llm": [[1, 3]], "vit": [[2, 0]]}, "device": EVIL, "platform": "cpu",
        "peak_tflops": None, "hosts": ["node0"] * 4, "described": EVIL, "done": 0,
    }
    records = [start] + [
        {"kind": "train", "iteration": i, "loss": loss / i, "grad_norm": 1.0, "lr": 1e-4 * i,
         "step_seconds": 2.0, "data_wait_seconds": 0.1, "tokens_per_second": 100.0, "tokens": 200,
         "positions": 250, "samples": 5, "images": 6, "trained_tokens": 20, "rows": 4,
         "memory_bytes": 2**30, "skipped_samples": {"too long": 1} if i == 2 else {}}
        for i in range(1, steps + 1)
    ] + [
        {"kind": "validation", "iteration": steps, "validation_loss": 0.5},
        {"kind": "ranks", "iteration": steps, "forward_seconds": [0.1, 0.2, 0.3, 0.4],
         "memory_bytes": [2**30] * 4, "hosts": ["node0"] * 4},
    ]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def test_several_runs_lie_over_each_other_with_their_names(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = [str(write_run(tmp_path / name / "log", loss=loss))
               for name, loss in (("a", 3.0), ("b", 4.0))]
    assert run(["plot", *sources]) == 0
    assert capsys.readouterr().out.split() == ["loss.png"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    runs = [read_history(source) for source in sources]
    with pytest.raises(InputError, match="8 runs are too many for one picture; give 7"):
        plot_runs(runs[:1] * (len(COLORS) + 1), "abcdefgh", tmp_path / "many.png")


LONG = "mcore-qwen2-vl-7B-lr-1e-5-minlr-1e-6-bs-1-gbs-256-seqlen-2048-pr-bf16-tp-2-pp-2-cp-1"


@pytest.mark.parametrize("count", [1, 3])
def test_long_names_are_not_cut_in_a_picture(count, tmp_path, monkeypatch):
    from matplotlib import pyplot

    names = [f"{LONG}-ac-sel-do-true-sp-false-ti-10000-wi-{number}" for number in range(count)]
    runs = [read_history(write_run(tmp_path / name)) for name in names]
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    plot_runs(runs, names, tmp_path / "x.png")
    monkeypatch.undo()
    (figure,) = drawn
    texts = [figure._suptitle, *figure.axes[0].get_legend().get_texts()]
    assert all(name in figure._suptitle.get_text().replace("\n", "") for name in names)
    for text in texts:
        assert text.get_window_extent().width < figure.bbox.width, text.get_text()
    pyplot.close(figure)


def test_changed_options_come_first_on_the_page(tmp_path):
    text = write_page(write_run(tmp_path / "log", save=tmp_path)).read_text()
    table = text[text.index("<h2>configuration") :]
    rows = re.findall(r"<tr( class=marked)?><td>([\w-]+)</td>", table)
    marks = [bool(mark) for mark, _ in rows]
    assert [name for mark, name in rows if mark] == ["train-data-path", "save"]
    assert marks == sorted(marks, reverse=True) and len(rows) > 50


@pytest.mark.parametrize(("command", "output", "says"), [
    ("plot", "x.foo", "--output x.foo ends in .foo; give a .png"),
    ("plot", "metrics.jsonl", "ends in .jsonl; give a .png"),
    ("plot", "there", "--output there is a directory; give a file"),
    ("plot", "there.png", "--output there.png is a directory"),
    ("plot", "file/deep/x.png", "file/deep/x.png cannot be written ("),
    ("report", "x.png", "--output x.png ends in .png; give a .html or .htm"),
    ("report", "there", "--output there is a directory; give a file"),
    ("report", "file/deep/x.html", "file/deep/x.html cannot be written ("),
])
def test_an_output_that_cannot_be_is_refused_by_one_sentence(
    command, output, says, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    for folder in ("there", "there.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert run([command, "run", "--output", output]) == 2
    out, err = capsys.readouterr()
    assert says in err and len(err.splitlines()) == 1 and not out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("command", "suffix"), [("plot", ".png"), ("report", ".html")])
def test_an_output_without_a_suffix_gets_one_and_is_named_as_it_is(
    command, suffix, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    assert run([command, "run", "--output", "out/new"]) == 0
    assert capsys.readouterr().out.split() == [f"out/new{suffix}"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"new{suffix}"]


@pytest.mark.parametrize("command", ["plot", "report"])
def test_a_run_that_is_no_text_is_refused_and_leaves_nothing(command, tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff" * 9)
    assert run([command, str(tmp_path / "x.png"), "--output", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert "x.png:1 is not a line of run metrics" in said and len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_full_disk_leaves_the_picture_and_the_page_that_were_there(small_disk, tmp_path):
    run = read_history(write_run(tmp_path / "log"))
    for name in ("x.png", "x.html"):
        (small_disk / name).write_text("old")
    fill(small_disk)
    for write in (lambda: plot_runs([run], ["log"], small_disk / "x.png"),
                  lambda: write_page(run.file, small_disk / "x.html")):
        with pytest.raises(InputError, match=r"x\.\w+ cannot be written \(.*No space left"):
            write()
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "x.html", "x.png"]
    assert {(small_disk / name).read_text() for name in ("x.png", "x.html")} == {"old"}


def test_numbers_that_were_not_finite_are_drawn_around(tmp_path):
    folder = write_run(tmp_path / "log")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {"loss": None, "grad_norm": None}
    lines.insert(4, {"kind": "validation", "iteration": 3, "validation_loss": None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    page = write_page(folder).read_text()
    assert "nan at first, 0.7500 at last" in page
    assert "0.5000 at last, 0.5000 at best, iteration 4" in page


def test_ranks_are_shown_with_the_layout_they_had(tmp_path):
    """The run goes on with other ranks, and has not told of them yet."""
    folder = write_run(tmp_path / "log")
    start = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    start |= {"done": 4, "layout": {"tp": 1, "pp": 1, "dp": 1}, "hosts": ["node0"],
              "split": {"llm": [[4]], "vit": [[2]]}}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")
    text = re.sub(r"<[^>]+>", "|", write_page(folder).read_text())
    assert "|3||1||node0||400.0|" in text and "|0||0||node0||100.0|" in text


@pytest.mark.parametrize(("sources", "names"), [
    (["runs/first/log"], ["first"]),
    (["runs/a/log/metrics.jsonl", "runs/b/log/metrics.jsonl"], ["a", "b"]),
    (["x/run/metrics.jsonl", "y/run"], ["x/run", "y/run"]),
    (["out/log/sft"], ["sft"]), (["out/a.jsonl", "out/b.jsonl"], ["a", "b"]),
])
def test_runs_are_named_by_what_tells_them_apart(sources, names):
    assert names_of(sources) == names


def test_the_page_holds_plots_layout_data_ranks_checkpoints_and_options(tmp_path, capsys):
    step = tmp_path / "save" / "iter_0000004"
    step.mkdir(parents=True)
    (step / "weights").write_bytes(bytes(3 * 2**20))
    folder = write_run(tmp_path / "log", save=tmp_path / "save")
    assert run(["report", str(folder)]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "report.html")]
    page = (folder / "report.html").read_text()
    assert 'src="data:image/png;base64,' in page
    text = re.sub(r"<[^>]+>", "|", page)
    for shown in ("|0||0-1||0-1||0|", "|1||2-3||-||1-3|", "loss|",
                  "3.0000 at first, 0.7500 at last", "20.0% of 1,000 positions",
                  "left out: too long||1", "iter_0000004||1 files||3.0 MiB", "seq-length||2048"):
        assert shown in text, shown
    # Nothing is loaded from elsewhere, and another's text stays text.
    assert EVIL not in page and page.count("&lt;script&gt;") == 3
    assert not re.search(r"<script|https?://|<link", page)


def test_the_page_shows_what_the_same_samples_are_answered_from_the_first_validation_to_the_last(
    tmp_path
):
    folder = write_run(tmp_path / "log", steps=6)
    picture = base64.b64encode(b"\xff\xd8 a picture").decode()
    asked = {"question": EVIL, "expected": "red", "pictures": [picture], "other_media": 2}
    accuracy = {"token_accuracy": 0.5, "exact_accuracy": 0.25}
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(1, 7):
            answer = {"sample": "a/1", "answer": f"said {step}", "exact": step == 6}
            file.write(json.dumps({
                "kind": "validation", "iteration": step, "validation_loss": 1 / step,
                "epoch": step / 4, **accuracy, "answers": [answer | (asked if step == 1 else {})],
                "datasets": {"a": {"validation_loss": 2.5, "samples": 3, **accuracy}},
            }) + "\n")
    page = write_page(folder).read_text()
    assert f'<img alt="a/1" src="data:image/jpeg;base64,{picture}"><br>and 2 more' in page
    assert "<td class=wrong>✗ said 4</td><td class=right>✓ said 6</td>" in page
    text = re.sub(r"<[^>]+>", "|", page)
    assert "iteration 1||iteration 2||iteration 4||iteration 6" in text and EVIL not in page
    assert "a||3||2.5000||50.0%||25.0%" in text
    assert "exact answers||25.0% at last, 25.0% at best, iteration 1|" in text


def test_the_page_maps_the_load_of_every_expert(tmp_path):
    folder = write_run(tmp_path / "log")
    file = folder / "metrics.jsonl"
    assert "load of the experts" not in write_page(folder).read_text()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for step in lines[1:5]:
        step |= {"expert_load_max": 2.0, "expert_load_min": 0.0, "routed_tokens": 80,
                 "dropped_tokens": 1}
    tokens = [[[0, 60, 20], [50, 20, 10]], [[40, 30, 10], [10, 20, 50]]]
    lines += [{"kind": "experts", "iteration": at, "steps": 2, "tokens": one}
              for at, one in zip((4, 2), tokens, strict=True)]
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    page = write_page(folder).read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert ("Iterations 3 to 4: the busiest is expert 1 of layer 0 with 2.25 times the mean of its "
            "layer; 1 of 6 experts got no token. In the whole run, full experts dropped 4 of 320 "
            "tokens that were sent to them (1.2%).") in page


def test_a_map_shows_an_expert_without_tokens_apart(monkeypatch):
    """Half the mean is as far from it as twice; nothing is further than four times."""
    from matplotlib import axes

    drawn = []
    show = axes.Axes.imshow

    def kept(self, numbers, **options):
        drawn.append((numbers, options["vmin"], options["vmax"]))
        return show(self, numbers, **options)

    monkeypatch.setattr(axes.Axes, "imshow", kept)
    assert load_map([[0, 60, 30, 10, 20], [24, 24, 24, 24, 24]]).startswith(b"\x89PNG")
    ((first, second), least, most), = drawn
    assert math.isnan(first[0]) and second == [0.0] * 5 and (least, most) == (-2, 2)
    assert first[1:] == pytest.approx([math.log2(one) for one in (2.5, 1.25, 10 / 24, 20 / 24)])


@pytest.mark.parametrize(("packed", "says"), [
    (0, "|steps||4 in 8 s"), (64, "|steps||4 of about 9 (forecast: rows are packed) in 8 s"),
])
def test_the_page_says_the_epochs_and_what_of_them_is_a_forecast(packed, says, tmp_path):
    folder = write_run(tmp_path / "log")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[0]["options"] |= {"num_train_epochs": 3.0, "packing_buffer_size": packed,
                            "train_iters": 9}
    for line in lines[1:5]:
        line["epoch"] = 0.3 * line["iteration"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    text = re.sub(r"<[^>]+>", "|", write_page(folder).read_text())
    assert says in text and "|epochs||1.20 of 3|" in text


def test_a_page_can_be_made_of_an_older_run_s_numbers_alone(tmp_path):
    folder = write_run(tmp_path / "log")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    old = [line for line in lines if '"kind": "train"' in line]
    (folder / "metrics.jsonl").write_text("\n".join(old))
    assert "<h2>plots</h2>" in write_page(folder).read_text()
