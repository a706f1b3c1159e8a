"""Every command of a family's page in examples/ is one that the program takes, at true sizes.

Launcher and convertor run as their shell scripts, dry, on the published config.json files. The
checkpoints to train from and to convert back are files of the true size whose numbers are holes.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import ROOT, Done, run
from test_docs import ARGUMENTS, CODE, LINK, blocks, headings, parser, paths, prose
from true_sizes import PARAMETERS, SIZES, write

from megatron_vl.models import family, load_spec
from megatron_vl.parallel import Layout
from megatron_vl.weights import convert, torch_dist, torch_file
from megatron_vl.weights.mcore_io import lay_out_mcore
from megatron_vl.weights.targets import McoreTarget, ShardedTarget

PREPARE = "toolkits/pretrain_data_preprocessing/"
OTHERS = {"pip", "modelscope", "hf", "unzip"}  # programs that are not ours


@dataclass(frozen=True)
class Page:
    """A family's page in both languages, and what its commands name."""

    family: str  # the folder of examples/
    name: str  # as the models are published
    size: str = "7B"  # that is trained on TP2 x PP2 and converted back
    first: int = 12  # language layers of it on stage 0

    readme = property(lambda self: f"examples/{self.family}/README.md")
    chinese = property(lambda self: f"examples/{self.family}/README_zh.md")
    trainer = property(lambda self: f"examples/{self.family}/run_mcore_qwen.sh")
    convertor = property(lambda self: "toolkits/model_checkpoints_convertor/qwen/"
                                      f"hf2mcore_{self.family}_convertor.sh")

    @property
    def shown(self) -> dict[str, str]:
        """Every size that is converted and trained, and its model_type."""
        sizes = dict.fromkeys(SIZES[self.family], self.family)
        return sizes | {"30B-A3B": "qwen3_vl_moe"} if self.family == "qwen3_vl" else sizes

    def model(self, root: Path, size: str) -> Path:
        return root / f"{self.name.lower()}-ckpts" / f"{self.name}-{size}-Instruct"


PAGES = [Page("qwen2_vl", "Qwen2-VL"), Page("qwen2_5_vl", "Qwen2.5-VL"),
         Page("qwen3_vl", "Qwen3-VL", size="8B", first=16)]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.family)


def lines(readme: str) -> list[str]:
    return [line for block in blocks(readme, "bash")
            for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def given(line: str) -> tuple[dict[str, str], list[str]]:
    """(variables, words) of a command line."""
    words, variables = shlex.split(line), {}
    while match := re.fullmatch(r"([A-Z][A-Z0-9_]*)=(.*)", words[0]):
        variables[match[1]] = match[2]
        del words[0]
    return variables, words


def calls(script: str) -> list:
    """The pages' calls of their `script`, named by what tells them apart."""
    found = []
    for page in PAGES:
        for line in lines(page.readme):
            variables, words = given(line)
            if words[:2] == ["bash", getattr(page, script)]:
                size = next(word for word in words[2:] if word in page.shown)
                found.append(pytest.param(page, variables, words, size,
                                          id=f"{len(found)} {page.name} {size}"))
    return found


@every_page
def test_both_languages_have_the_same_commands_and_headings(page):
    both = page.readme, page.chinese
    assert lines(page.readme) == lines(page.chinese)
    levels = [[level for level, _ in headings(one)] for one in both]
    codes = [{code for code in CODE.findall(prose(one)) if "/" in code or code.isupper()}
             for one in both]
    assert levels[0] == levels[1] and codes[0] == codes[1]


@every_page
def test_every_published_size_is_converted_and_trained(page):
    for script in ("convertor", "trainer"):
        sizes = {one.values[3] for one in calls(script) if one.values[0] is page}
        assert sizes == page.shown.keys(), script


@pytest.mark.parametrize("readme", [one for page in PAGES for one in (page.readme, page.chinese)])
def test_every_path_and_link_leads_somewhere(readme):
    names = {"/", *(word for line in lines(readme) if given(line)[1][0] in OTHERS
                    for word in given(line)[1])}  # what other programs are given
    named = [path for path in paths(readme) if not {path[:1], path} & names]
    assert named and not [path for path in named if not (ROOT / path).exists()]
    links = LINK.findall(prose(readme))
    assert links and all((ROOT / readme).parent.joinpath(link).exists() for link in links), links


@every_page
def test_the_way_is_shown_in_order_and_nothing_else_is_called(page):
    order = []
    for line in lines(page.readme):
        _, words = given(line)
        order.append(words[1] if words[0] in ("bash", "python", "megatron-vl") else words[0])
        assert words[0] in OTHERS | {"bash", "python", "megatron-vl"}, line
        if words[0] == "bash":
            assert len(words) - 2 in ARGUMENTS[words[1]], line
    first = [order.index(step) for step in (
        "pip", "modelscope", PREPARE + "convert_llava_pretrain_to_wds.py", page.convertor,
        page.trainer,
    )]
    assert first == sorted(first)
    backs = [words for _, words in map(given, lines(page.readme)) if "true" in words[6:8]
             and words[1] == page.convertor]
    assert len(backs) == 2 and order[-2:] == [page.convertor, "verify"]


@pytest.mark.parametrize("line", [
    line for page in PAGES for line in lines(page.readme)
    if given(line)[1][0] in ("python", "megatron-vl")
])
def test_other_commands_are_taken_by_their_parsers(line, monkeypatch):
    """A script in Python says which command of the program it would become."""
    _, words = given(line)
    if words[0] == "python":
        became = []
        monkeypatch.setattr(os, "execve", lambda program, argv, environment: became.append(argv))
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        words = became[0][2:]
        assert words[0] == "megatron_vl"
    args = parser(words[1]).parse_args(words[2:])
    if words[1] == "prepare":
        assert args.json or args.source.suffix == ".json"


# ---- convert ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    """What /mnt stands for, before anything was converted: config.json files alone."""
    root = tmp_path_factory.mktemp("mnt")
    return write_configs(root)


def write_configs(root: Path) -> Path:
    for page in PAGES:
        for size, name in page.shown.items():
            write(page.model(root, size), size, name)
    return root


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """The same with every page's converted model and its trained run, whose numbers are holes."""
    root = write_configs(tmp_path_factory.mktemp("filled"))
    for page in PAGES:
        fill(root, page)
    held = sum(path.stat().st_blocks * 512 for path in root.rglob("*") if path.is_file())
    assert held < 10**8, "the numbers are holes"
    return root


def fill(root: Path, page: Page) -> None:
    whole = page.model(root, page.size)
    spec = load_spec(whole)
    weights = family(spec.model_type).weight_map(spec)
    source = convert.open_source(whole, weights, planned_dtype="bfloat16")
    layout, split = Layout(tp=2, pp=2), spec.split(pp=2, first_stage_layers=page.first)

    def args(dtype: str) -> dict:
        return spec.megatron_args(layout, split, dtype)

    # Not convert.run_conversion: it would take the place on the disk.
    with pytest.MonkeyPatch.context() as patch:
        for module in (torch_file, torch_dist):
            patch.setattr(module, "reserve", lambda file, size: file.truncate(size))
        one = convert.plan_conversion(
            source, weights, McoreTarget(layout=layout, split=split, args=args))
        there = write(whole.with_name(f"{whole.name}-tp2-pp2"), page.size, page.family)
        lay_out_mcore(there, one.files, one.dtypes, args("bfloat16"))
        one = convert.plan_conversion(
            source, weights, ShardedTarget(max_shard_bytes=5 * 10**9, args=args))
        (there,) = [Path(words[3].replace("/mnt/", f"{root}/")) for _, words in
                    map(given, lines(page.readme))
                    if "/checkpoint/" in words[min(3, len(words) - 1)]]
        write(there, page.size, page.family)
        one.target.lay_out(there, one.files, one.dtypes, "bfloat16", weights)


def dry(variables: dict, words: list[str], root: Path, **more: object) -> Done:
    """A command with MP_DRY_RUN, in the storage `root`; it may not change that."""
    before = sorted(root.rglob("*"))
    words, variables = (
        [word.replace("/mnt/", f"{root}/") for word in words],
        {name: value.replace("/mnt/", f"{root}/") for name, value in variables.items()},
    )
    done = run(words, **{**more, **variables, "MP_DRY_RUN": "true"})
    assert sorted(root.rglob("*")) == before
    return done


@pytest.mark.parametrize(("page", "variables", "words", "size"), calls("convertor"))
def test_a_conversion_plans_every_byte_at_its_true_size(
    page, variables, words, size, storage, filled
):
    back = words[7] == "true"
    done = dry(variables, words, filled if back else storage)
    assert done.code == 0, done.err
    total = int(re.fullmatch(r"total: .* ([\d,]+) bytes", done.out.splitlines()[-1])[1]
                .replace(",", ""))
    tp, pp = int(words[5]), int(words[6])
    if back:
        assert total == 2 * PARAMETERS[page.shown[size]][size]
        return
    options = ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
    options += ["--sequence-parallel"] if tp > 1 else []  # experts ask for it; it holds no weight
    if "MP_PP0_LAYERS" in variables:
        options += ["--decoder-first-pipeline-num-layers", variables["MP_PP0_LAYERS"]]
    options += [word for name, flag in (("MP_EP", "--ep"), ("MP_ETP", "--etp")) if name in variables
                for word in (flag, variables[name])]
    said = run([sys.executable, "-m", "megatron_vl", "train", "--dry-run", "--hf-config",
                words[3].replace("/mnt/", f"{storage}/"), "--train-data-path", "none",
                "--nproc-per-node", tp * pp, *options])
    assert total == 2 * held_by_the_model(said.out), "what training says is what is written"


# ---- train ------------------------------------------------------------------------------------


def held_by_the_model(said: str) -> int:
    """Numbers that ranks of every part hold together, on which the tables of a dry run agree."""
    sentence = re.search(r"the model has ([\d,]+) parameters; (?:TP (\d+) x PP (\d+) ranks|(\d+) "
                         r"ranks, one of every part of it,) hold ([\d,]+)(?: = (.*))?$", said, re.M)
    model, tp, pp, ranks, held = (
        int((group or "0").replace(",", "")) for group in sentence.groups()[:5])
    if sentence[6]:
        parts = [int(part.split()[0].replace(",", "")) for part in sentence[6].split(" + ")]
        assert (parts[0], sum(parts)) == (model, held)
    else:
        assert model == held
    rows = re.findall(r"^stage \d+ +([\d,]+) ", said, re.M)
    assert len(rows) == (pp or len(rows))
    of_a_stage = ranks // len(rows) if ranks else tp
    assert sum(int(row.replace(",", "")) for row in rows) * of_a_stage == held
    return held


@pytest.mark.parametrize(("page", "variables", "words", "size"), calls("trainer"))
@pytest.mark.parametrize("there", [False, True], ids=["before", "after"])
def test_a_training_is_laid_out_at_its_true_size(
    page, variables, words, size, there, storage, filled
):
    """Before its weights are converted, and with them."""
    if there and size != page.size:
        pytest.skip("weights of one size alone were converted")
    root = filled if there else storage
    cluster = {"WORLD_SIZE": 8, "RANK": 3, "MASTER_ADDR": "node-0"} if words[2] == "dlc" else {}
    config = {} if there else {"MP_HF_PATH": page.model(root, size)}
    done = dry(variables, words, root, NPROC_PER_NODE=8, **cluster, **config)
    assert done.code == 0, done.err
    assert f"the model has {PARAMETERS[page.shown[size]][size]:,} parameters" in done.out
    held_by_the_model(done.out)
    tp, pp = map(int, words[11:13])
    nodes = int(cluster.get("WORLD_SIZE", 1))
    apart = "".join(f"{short}{variables[f'MP_{short}']}x" for short in ("EP", "ETP")
                    if f"MP_{short}" in variables)
    assert f"TP{tp}xPP{pp}x{apart}DP{8 * nodes // (tp * pp)}" in done.out
    assert f"= {nodes} node{'s' * (nodes > 1)} x 8" in done.out
    # Every layer is on one stage, as many on the first as was asked for.
    table = done.out.partition("\nstage ")[2].partition("\n\n")[0]
    stages = re.findall(r"^\d+ +\d+-\d+ +(\S+) +(\S+) ", table, re.M)
    layers = [number for _, span in stages for number in
              range(int(span.split("-")[0]), int(span.split("-")[-1]) + 1)]
    assert layers == list(range(SIZES[page.shown[size]][size][0])) and len(stages) == pp
    if "MP_PP0_LAYERS" in variables:
        assert stages[0][1] == f"0-{int(variables['MP_PP0_LAYERS']) - 1}"
    fits = "weights come from" in done.out
    awaited = re.search("^note: load .* is not there yet", done.out, re.M) is not None
    assert fits is there and awaited is not there


@every_page
def test_the_run_that_is_converted_back_is_the_one_that_was_trained(page):
    commands = list(map(given, lines(page.readme)))
    (back,) = [words[3] for _, words in commands if words[1:2] == [page.convertor]
               and "/checkpoint/" in words[3]]
    saves = []
    for variables, words in commands:
        if words[1:2] == [page.trainer] and "MP_DRY_RUN" not in variables:
            done = run(words, PYTHON="echo")
            options = done.out.splitlines()[-1].split()
            saves.append(options[options.index("--save") + 1])
    assert back in saves
