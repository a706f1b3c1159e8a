"""Lint: what it counts, how well it foretells rows, and what its page does with hostile text."""

import json
import os
import shutil
import tarfile
from html.parser import HTMLParser
from itertools import chain

import pytest
from mixed_data import said, write_image

from megatron_vl.cli.main import run
from megatron_vl.data.lint.forecast import Forecaster, lengths_around
from megatron_vl.data.lint.look import STOPS, Look, Looker, build_encoder
from megatron_vl.data.lint.mask import pieces
from megatron_vl.data.lint.page import choose as choose_shown
from megatron_vl.data.lint.reading import Leaf, choose, open_leaves
from megatron_vl.data.lint.run import LintConfig
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.load.task_encoder import SampleEncoder
from megatron_vl.data.options import TrainedText
from megatron_vl.errors import printable
from megatron_vl.models import family

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\" '> </div> & &lt; \u202eevil \x1b[2J"
)
CHINESE = "没有颜色 🔴。龘靐齉\n第二行"


@pytest.fixture
def lint(hf_dir, tmp_path, monkeypatch):
    """Runs the command; returns its code, its numbers, and its page."""

    def call(data, *words, model=True, draws=False):
        if not draws:
            monkeypatch.setattr("megatron_vl.data.lint.run.draw", lambda *_: {})
        monkeypatch.chdir(tmp_path)
        model = ["--model", str(hf_dir)] if model else []
        code = run(["lint", str(data), *model, "--out", "report", "--quiet", *map(str, words)])
        page = tmp_path / "report" / "lint.html"
        if not page.exists():
            return code, None, None
        return code, json.loads((page.parent / "lint.json").read_text()), page.read_text()

    return call


@pytest.fixture
def looker(hf_dir, spec):
    """Looks at a dataset with training's options, `leaves` and `looks` beside it."""

    def build(data, split="train", decode=False, **options):
        config = DataConfig(**{"train": Mixture.parse(str(data)), "seq_length": 2048} | options)
        leaves = open_leaves(config.train, split)
        encoder = build_encoder(config, hf_dir, spec, family(spec.model_type), split="train")
        found = Looker(leaves, encoder, decode=decode)
        found.config = config
        found.looks = [found.look(*place) for place in choose(leaves, 0, seed=0)]
        return found

    return build


@pytest.fixture(scope="module")
def odd_dir(tmp_path_factory):
    """A few samples whose text would be markup, is Chinese, or goes on for several turns."""
    root = tmp_path_factory.mktemp("odd")
    write_image(root / "in" / "images" / "a.png", (64, 48))
    entries = [
        {"conversations": said(f"<image>{HOSTILE}", HOSTILE), "images": ["a.png"]},
        {"conversations": said("<image>什么颜色？", CHINESE), "images": ["a.png"]},
        {"conversations": said("1?", "one", "2?", "two", "3?", "three")},
        {"conversations": said("long?", "word " * 200)},
        {"conversations": said("empty?", " ")},
        {"conversations": said("<image>where?", "there"), "images": ["b.png"]},
        {"conversations": said("and?", "")},
    ]
    (root / "in" / "data.json").write_text(json.dumps(entries))
    assert run(["prepare", str(root / "in"), str(root / "wds"), "--format", "sharegpt", "--quiet",
                "--split", "1,0,0"]) == 0
    return root / "wds"


class _Page(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.sources, self.handlers, self.words = set(), [], [], []
        self.feed(page)
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.words.append(data)


# ---- the report ------------------------------------------------------------------------------


def test_the_report_of_images_videos_text_and_chinese(lint, mixed_dir, capsys):
    code, numbers, page = lint(mixed_dir, "--samples", 0, "--seq-length", 256,
                                "--max-patches-per-row", 300, draws=True)
    assert code == 0
    (dataset,) = numbers["datasets"]
    train, val = (dataset["splits"][name] for name in ("train", "val"))
    assert train["samples"] + val["samples"] == 140 and train["shards"] + val["shards"] == 10
    assert numbers["looked_at"] == numbers["usable"] == train["samples"]
    assert not numbers["refused"]
    kinds, media = numbers["kinds"], numbers["media"]
    every = _samples(mixed_dir, train["samples"])
    kinds_of = [[m["kind"] for m in one["media"]] for one in every]
    assert kinds["with images"] == sum("image" in kinds for kinds in kinds_of)
    assert kinds["with videos"] == sum("video" in kinds for kinds in kinds_of)
    assert kinds["text only"] == kinds_of.count([])
    assert media["images"] + media["videos"] == len(list(chain(*kinds_of)))
    report = capsys.readouterr().out
    assert "rows of at most 300 patches" in report and "usable, 0 refused" in report
    names = {"tokens", "patches", "images", "sizes", "rows"}
    assert set(os.listdir("report")) == {"lint.json", "lint.html", *(f"{n}.png" for n in names)}
    seen = _Page(page)
    assert all(source.startswith("data:image/png;base64,") for source in seen.sources)
    assert len(seen.sources) > len(names), "pictures, and thumbnails"
    for words in ("with a video", "of several turns", "text only", "image 6x14", "video 3x4x4",
                  "没有颜色 🔴。"):
        assert words in seen.text, words


def _samples(wds, count):
    """The JSON of the first samples, which are the training split's."""
    found = []
    for shard in sorted(wds.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found += [json.load(tar.extractfile(name)) for name in tar.getnames()
                      if name.endswith(".json")]
    return found[:count]


def test_what_prepare_refused_is_told_too(lint, odd_dir, capsys):
    code, numbers, page = lint(odd_dir, model=False)
    assert code == 0 and not numbers["refused"]
    (dataset,) = numbers["datasets"]
    assert dataset["refused_by_prepare"] == {"empty answer": 2, "missing media": 1}
    title = "refused when prepared, listed in refused.jsonl"
    assert title in capsys.readouterr().out and title in page


def test_a_report_is_replaced_and_nothing_else_is(lint, odd_dir, tmp_path, capsys):
    assert lint(odd_dir)[0] == 0 and lint(odd_dir)[0] == 0
    (tmp_path / "report" / "notes.txt").write_text("mine")
    assert lint(odd_dir)[0] == 2
    assert "holds more than a lint report" in capsys.readouterr().err
    assert (tmp_path / "report" / "notes.txt").read_text() == "mine"


def test_reports_lie_beside_their_dataset_and_none_is_overwritten(wds_dir, tmp_path, monkeypatch):
    data = tmp_path / "data" / "wds"
    data.parent.mkdir()
    data.symlink_to(wds_dir)
    monkeypatch.chdir(tmp_path)

    def target(*paths):
        return LintConfig(data=Mixture.parse(",".join(map(str, paths)))).target

    shutil.copytree(wds_dir, tmp_path / "own")
    assert target("own") == tmp_path / "own-lint"
    (tmp_path / "own-lint").mkdir()
    (tmp_path / "own-lint-2").touch()
    assert target("own") == target(tmp_path / "own") == tmp_path / "own-lint-3"
    assert target("own", data) == tmp_path / "own+wds-lint"
    assert target(data) == tmp_path / "data" / "wds-lint"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root none is refused
    assert target(data) == tmp_path / "wds-lint"


def test_without_a_model_sizes_and_kinds_are_counted(lint, mixed_dir, capsys):
    code, numbers, _ = lint(mixed_dir, model=False)
    assert code == 0 and "forecast" not in numbers and "tokens" not in numbers["a_sample"]
    assert numbers["kinds"]["with videos"] and numbers["media_width"]["most"] == 200
    assert "without --model, tokens, patches and rows are not counted" in capsys.readouterr().out


BAD = {
    "no dataset": ("nowhere", [], "the dataset nowhere does not exist"),
    "no samples": (None, ["--samples", -1], "samples is -1"),
    "no row": (None, ["--seq-length", 0], "seq-length is 0"),
    "no split": (None, ["--split", "val"], "nothing in its split 'val'"),
    "both masks": (None, ["--train-on-prompt", "--mask-history"], "exclude one another"),
    "decoding blindly": (None, ["--decode"], "decode needs the model's image settings"),
}


@pytest.mark.parametrize(("data", "words", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(lint, odd_dir, tmp_path, capsys, data, words, sentence):
    assert lint(data or odd_dir, *words, model=False)[0] == 2
    said_ = capsys.readouterr().err
    assert sentence in said_ and len(said_.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ---- what is refused -------------------------------------------------------------------------


def test_what_a_row_cannot_hold_is_refused_by_name_and_fails_a_strict_run(lint, odd_dir, capsys):
    code, numbers, page = lint(odd_dir, "--seq-length", 256, "--strict")
    assert code == 1 and numbers["looked_at"] == 4 and numbers["usable"] == 3
    assert capsys.readouterr().err == (
        "megatron-vl lint: 1 of 4 samples cannot be used; see report/lint.html.\n"
    )
    found = numbers["refused"]["too long"]
    (one,) = found["samples"]
    assert found["count"] == 1 and one["sample"].endswith("/3")
    assert f"{one['sample']} it has" in _Page(page).text
    assert numbers["least_seq_length"] == 512 >= numbers["a_sample"]["tokens"]["most"]
    lost = {row["seq_length"]: row["lost"] for row in numbers["forecast"]}
    assert lost[256] == 0.25 and lost[512] == 0


def test_a_broken_image_is_found_where_media_are_decoded(lint, mixed_dir, tmp_path):
    wds = shutil.copytree(mixed_dir, tmp_path / "wds")
    shard = wds / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(".png"))
    with shard.open("r+b") as file:
        file.seek(member.offset_data + member.size // 2)
        file.write(bytes(member.size // 4))
    code, numbers, _ = lint(wds, "--samples", 0, "--strict")
    assert code == 0 and not numbers["refused"], "no pixel is read"
    code, numbers, page = lint(wds, "--samples", 0, "--strict", "--decode")
    (one,) = numbers["refused"]["unusable media"]["samples"]
    assert code == 1 and one["sample"] == f"{shard.name}/{member.name.split('.')[0]}"
    assert one["sample"] in _Page(page).text


def test_what_would_stop_training_is_told_apart(looker, odd_dir, tmp_path):
    wds = shutil.copytree(odd_dir, tmp_path / "wds")
    shard = sorted(wds.glob("*.tar"))[0]
    with tarfile.open(shard) as tar:
        names = [m for m in tar.getmembers() if m.name.endswith(".json")]
    with shard.open("r+b") as file:
        file.seek(names[0].offset_data)
        file.write(b"[")
    found = looker(wds)
    assert [look.reason for look in found.looks].count(STOPS) == 1
    (bad,) = (look for look in found.looks if look.reason)
    assert bad.name == f"{shard.name}/{names[0].name[:-5]}"
    assert "holds text or JSON that cannot be read" in bad.message


def test_where_nothing_can_be_used_the_report_says_why(lint, odd_dir, tmp_path, capsys):
    wds = shutil.copytree(odd_dir, tmp_path / "wds")
    for shard in wds.glob("*.tar"):
        shard.write_bytes(shard.read_bytes().replace(b'"messages"', b'"massages"'))
    code, numbers, page = lint(wds)
    assert code == 0 and numbers["usable"] == 0 and numbers["refused"]["wrong shape"]["count"] == 4
    assert "no sample could be encoded" in capsys.readouterr().out and "wrong shape" in page


# ---- the masks -------------------------------------------------------------------------------


@pytest.mark.parametrize(("trained", "answers"), [
    (TrainedText(), ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]),
    (TrainedText(mask_history=True), ["three<|im_end|>"]),
])
def test_the_page_shows_the_answers_as_trained(looker, odd_dir, trained, answers):
    found = looker(odd_dir, trained=trained)
    (look,) = (look for look in found.looks if look.answers > 1)
    shown = list(_pieces(found, look))
    parts = [piece.text for piece in shown if piece.trained]
    assert ["".join(pair) for pair in zip(parts[::2], parts[1::2], strict=True)] == answers
    assert all(piece.text == "<|im_end|>" for piece in shown if piece.trained and piece.special)


def _pieces(found, look):
    encoded = found.encode(look)
    media = found.encoder.model.processor
    return pieces(
        encoded.tokens, encoded.labels, chat=found.encoder.model.chat,
        media_tokens=[media.num_tokens(grid) for grid in encoded.grids],
    )


def test_characters_of_several_tokens_are_whole(looker, odd_dir):
    found = looker(odd_dir)
    chat = found.encoder.model.chat.tokenizer
    for look in found.looks:
        encoded, shown = found.encode(look), list(_pieces(found, look))
        text = "".join("<|image_pad|>" if p.media is not None else p.text for p in shown)
        assert "\ufffd" not in text
        assert text == chat.decode(_single(encoded.tokens.tolist(), chat))
        if "龘" in text:
            assert any("\ufffd" in chat.decode([t]) for t in encoded.tokens.tolist())


def _single(tokens, chat):
    """Each run of image places as one."""
    place = chat.convert_tokens_to_ids("<|image_pad|>")
    return [t for i, t in enumerate(tokens) if t != place or tokens[i - 1] != place]


def test_hostile_text_is_shown_and_never_obeyed(lint, odd_dir):
    code, _, page = lint(odd_dir)
    assert code == 0
    seen = _Page(page)
    assert not seen.tags & {"script", "iframe", "object", "link", "a"} and not seen.handlers
    assert all(source.startswith("data:image/png;base64,") for source in seen.sources)
    assert HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b") in seen.text
    assert "\u202e" not in page and "\x1b" not in page
    assert CHINESE.replace("\n", "↵\n") in seen.text


def test_what_steers_a_terminal_is_written_out():
    assert printable("a\x1b[2J\u202e\ud800\x00 é 中\n🔴") == (
        "a\\x1b[2J\\u202e\\ud800\\x00 é 中\n🔴"
    )


# ---- what is looked at -----------------------------------------------------------------------


def _leaf(count, share):
    return Leaf(path=None, places=range(100, 100 + count), share=share, epoch=count,
                _factory=None, _reader=None)


def test_samples_are_spread_over_the_shards_and_shared_over_the_datasets():
    chosen = list(choose([_leaf(10_000, 0.25), _leaf(30_000, 0.75)], 400, seed=1))
    for number, (count, size) in enumerate([(100, 10_000), (300, 30_000)]):
        places = [place - 100 for leaf, place in chosen if leaf == number]
        assert [place * count // size for place in places] == list(range(count))
        assert len({place % 2 for place in places}) == 2, "no comb"
    assert list(choose([_leaf(5, 1)], 0, seed=1)) == [(0, 100 + i) for i in range(5)]
    assert len(list(choose([_leaf(5, 1)], 2000, seed=1))) == 5


def test_a_mixture_is_looked_at_as_it_is_weighed(looker, mixed_dir, odd_dir):
    leaves = open_leaves(Mixture.parse(f"1,{mixed_dir},3,{odd_dir}"), "train")
    assert [leaf.share for leaf in leaves] == [0.25, 0.75]
    leaves = open_leaves(Mixture.parse(f"{mixed_dir},{odd_dir}", max_samples=4), "train")
    assert [len(leaf.places) for leaf in leaves] == [4, 4]
    assert [leaf.share for leaf in leaves] == [0.5, 0.5]


def test_a_dataset_of_energons_own_type_is_counted_the_same(looker, wds_dir, vqa_dir):
    totals = []
    for data in (wds_dir, vqa_dir):
        looks = [*looker(data).looks, *looker(data, split="val").looks]
        assert not any(look.reason for look in looks)
        totals.append([sum(getattr(look, name) for look in looks)
                       for name in ("tokens", "trained", "patches", "answers")])
    assert totals[0] == totals[1]


def test_samples_worth_seeing_are_shown_once_each():
    looks = [Look(leaf=0, place=i, name=str(i), tokens=10 + i, answers=1 + (i == 3))
             for i in range(5)]
    shown = {look.place: why for look, why in choose_shown(looks, seed=0)}
    assert shown[0].startswith("the shortest") and shown[4] == "the longest"
    assert shown[2].startswith("of median length") and "of several turns" in shown[3]
    assert shown[1] == "at random" and len(shown) == 5
    assert choose_shown([Look(leaf=0, place=0, name="x", reason="too long")], seed=0) == []


# ---- the forecast ----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 200])
def test_rows_are_foretold_as_training_makes_them(looker, mixed_dir, hf_dir, spec, monkeypatch,
                                                  limit):
    found = looker(mixed_dir, seq_length=256, max_patches_per_row=limit)
    told = Forecaster(found.leaves, found.looks, endless=True, seed=1).rows(256, limit)
    # Rows are what counts here, not pixels.
    monkeypatch.setattr(SampleEncoder, "decode_media", lambda self, sample, *_: sample)
    config = DataConfig(train=found.config.train, seq_length=256, max_patches_per_row=limit,
                        num_workers=0)
    rows, samples, patches, tokens = 0, 0, [], 0
    for batch in build_train_loader(
        config, hf_dir=hf_dir, spec=spec, family=family(spec.model_type)
    ):
        rows, samples = rows + 1, samples + batch.num_samples
        patches.append(int(batch.grid_thw.prod(-1).sum()))
        tokens += batch.num_tokens
        if samples >= 1024:
            break
    assert told.fill == pytest.approx(tokens / (rows * 256), rel=0.01)
    assert told.samples == pytest.approx(samples / rows, rel=0.01)
    assert told.patches_mean == pytest.approx(sum(patches) / rows, rel=0.02)
    assert told.patches_max == pytest.approx(max(patches), rel=0.05)
    assert told.rows == pytest.approx(len(found.looks) / (samples / rows), abs=1)
    if limit is not None:
        assert told.patches_max <= limit


def _looks(leaf, tokens, count=50):
    return [Look(leaf=leaf, place=i, name=str(i), tokens=tokens) for i in range(count)]


def test_a_forecast_draws_from_datasets_as_they_are_weighed():
    leaves = [_leaf(1000, 0.25), _leaf(10, 0.75)]
    forecaster = Forecaster(leaves, [*_looks(0, 100), *_looks(1, 300)], endless=True, seed=0)
    told = forecaster.rows(1000)
    assert told.alone == pytest.approx((0.25 * 100 + 0.75 * 300) / 1000, rel=0.01)
    assert told.lost == 0 and told.unevenness is None, "there are no images"
    assert forecaster.rows(200).lost == 0.75
    assert forecaster.rows(50).lost == 1 and forecaster.rows(50).fill is None


def test_a_small_validation_split_is_packed_once():
    told = Forecaster([_leaf(6, 1.0)], _looks(0, 30, 6), endless=False, seed=0).rows(100)
    assert (told.rows, told.samples, told.fill) == (2, 3.0, 0.9)


@pytest.mark.parametrize(("length", "around"), [
    (2048, [512, 1024, 2048, 4096, 8192]), (3000, [1024, 2048, 3000, 4096, 8192]),
    (1, [1, 2, 4]),
])
def test_lengths_around_one_are_powers_of_two(length, around):
    assert lengths_around(length) == around
