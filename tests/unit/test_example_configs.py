"""Every file of examples/configs/ is a run of its model at its true size that fits its GPUs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from commands import ROOT
from test_docs import text
from test_families import TINY
from true_sizes import SIZES, counted, write

from megatron_vl.cli.main import run

FOLDER = ROOT / "examples" / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
ROOM = 64  # GiB of a card's 80: activations, and what libraries take, need the rest
SMALL_ROOM = 14  # of a card's 16, activations included
NODE = 8  # GPUs
MODELS = {  # how files and tables name a model -> its model_type
    "qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl", "qwen_vl": "qwen", "qwen2_5": "qwen2",
    "qwen3": "qwen3", "qwen3_moe": "qwen3_moe", "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl_moe", "baichuan2": "baichuan",
}
README = "examples/configs/README.md"


@dataclass(frozen=True)
class Dry:
    """What `--dry-run` says of a run."""

    code: int
    text: str

    layout = property(lambda self: re.search(
        r", (TP\d+xPP\d+(?:xEP\d+)?(?:xETP\d+)?xDP\d+)", self.text)[1])
    rows = property(lambda self: re.findall(
        r"^stage \d+ .* (\d+\.\d\d)(?: +([\d,]+))?$", self.text, re.M))
    gib = property(lambda self: max(float(device) for device, _ in self.rows))
    with_activations = property(lambda self: max(map(float, re.findall(
        r"^on stage \d+ .* (\d+\.\d\d)$", self.text, re.M))))
    host = property(lambda self: max(
        int(host.replace(",", "") or 0) for _, host in self.rows) / 2**30)


@pytest.fixture(scope="module")
def dry(request, tmp_path_factory):
    """Dry-runs words on a model of a size and a number of GPUs."""
    root = tmp_path_factory.mktemp("published")

    def model(name: str, size: str) -> Path:
        family, path = MODELS[name], root / f"{name}-{size}"
        if family in SIZES:
            return write(path, size, family)
        path.mkdir(exist_ok=True)
        tiny = request.getfixturevalue(TINY[family])
        (path / "config.json").write_text(json.dumps(counted(tiny, family, size)))
        return path

    def dry(capsys, name: str, size: str, gpus: int, *words: str) -> Dry:
        code = run([
            "train", "--dry-run", *words, "--hf-config", str(model(name, size)), "--load", "HF_DIR",
            "--train-data-path", "DATA", "--save", str(root / "run"),
            "--nnodes", str(-(-gpus // NODE)), "--nproc-per-node", str(min(gpus, NODE)),
        ])
        return Dry(code, "".join(capsys.readouterr()))

    return dry


def named(file: Path) -> tuple[str, str, int]:
    """Model, size and number of GPUs, of a file's name and its model-size."""
    size = yaml.safe_load(file.read_text())["model-size"]
    spelled = re.sub(r"\W", "_", size.lower())
    name, gpus, cards = re.fullmatch(
        rf"(\w+)_{spelled}(?:_lora)?_(?:(\d+)gpu|(?:(\d+)x)?16gb)", file.stem).groups()
    return name, size, int(gpus or cards or 1)


def table(readme: str, heading: str) -> list[list[str]]:
    """Cells of the table whose first column has this heading."""
    rows = text(readme).partition(f"\n| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_fits_its_gpus_and_says_why_of_every_key(file, dry, capsys):
    name, size, gpus = named(file)
    done = dry(capsys, name, size, gpus, "--config", str(file))
    assert done.code == 0, done.text
    assert done.gib <= ROOM
    assert "16gb" not in file.stem or done.with_activations <= SMALL_ROOM
    head, lines = [], file.read_text().splitlines()
    while lines[0].startswith("#"):
        head.append(lines.pop(0))
    assert f"--config examples/configs/{file.name} " in "\n".join(head)
    assert ("docs/clusters.md" in "\n".join(head)) == (gpus > NODE)
    uncommented = [line for line in lines if not re.fullmatch(r"[a-z0-9-]+: \S+ +# \S.*", line)]
    assert not uncommented and len(lines) == len(yaml.safe_load(file.read_text()))
    batch = re.search(
        r"# rows of a step: (\d+) replicas? x (\d+) microbatch(?:es)?(?: x (\d+) rows)?$",
        file.read_text(), re.M)
    replicas, microbatches, rows = (int(number or 1) for number in batch.groups())
    assert done.layout.endswith(f"DP{replicas}") and (
        f"= {microbatches} microbatches x {rows} rows x {replicas} data ranks" in done.text)
    host = f"{done.host:.0f}" if done.host else "–"
    row = [f"[`{file.stem}`]({file.name})", done.layout, f"{done.gib:.1f}", host]
    for readme in (README, README.replace(".md", "_zh.md")):
        assert row in table(readme, "file" if "zh" not in readme else "文件")


def test_the_tables_name_every_file_and_no_other():
    for readme, heading in ((README, "file"), (README.replace(".md", "_zh.md"), "文件")):
        found = [re.search(r"\((.*)\)", row[0])[1] for row in table(readme, heading)]
        assert sorted(found) == [file.name for file in FILES]


def test_what_has_no_file_does_not_fit(dry, capsys):
    rows = table(README, "model")
    assert rows == table(README.replace(".md", "_zh.md"), "模型") and rows
    for model, gpus, options, gib in rows:
        name, size = model.strip("`").rsplit(" ", 1)
        done = dry(capsys, name, size, int(gpus), *options.strip("`").split())
        assert done.code == 0 and f"{done.gib:.1f}" == gib and done.gib > ROOM, done.text
        assert (name, size, int(gpus)) not in map(named, FILES)


def test_what_a_7b_takes_of_small_cards_is_what_a_dry_run_says(dry, capsys):
    """Of examples/baichuan2/README.md, whose rows name a file, and whose columns a row's length."""
    readme, chinese = "examples/baichuan2/README.md", "examples/baichuan2/README_zh.md"
    rows = table(readme, "configuration")
    assert rows == table(chinese, "配置")
    files = {file.stem: file for file in FILES if "16gb" in file.stem}
    assert sorted(row[0].strip("`") for row in rows) == sorted(files)
    for stem, *cells in rows:
        file = files[stem.strip("`")]
        for length, cell in zip((512, 1024, 2048), cells, strict=True):
            done = dry(capsys, *named(file), "--config", str(file), "--seq-length", str(length))
            assert done.code == 0 and f"{done.with_activations:.2f}" == cell, done.text
