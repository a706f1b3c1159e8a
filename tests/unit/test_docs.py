"""What the documents name exists: paths, commands, options, arguments; and the READMEs agree."""

import re
import shlex
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from test_import_rule import ALWAYS, ROOMS

from megatron_vl.cli.main import COMMANDS, Parser
from megatron_vl.cli.mm_convert import make_parser as mm_convert
from megatron_vl.launch.cluster import ROWS as SCHEDULERS
from megatron_vl.training.options.config_sources import load_config

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README_zh.md")
DOCUMENTS = (*READMES, *sorted(f"docs/{path.relative_to(ROOT / 'docs').as_posix()}"
                               for path in (ROOT / "docs").rglob("*.md")))
PAGES = tuple(name for name in DOCUMENTS if re.fullmatch(r"docs/[^/]+", name))

TRAINER = "examples/qwen2_vl/run_mcore_qwen.sh"
CONVERTOR = "toolkits/hf2mcore_convertor.sh"
ARGUMENTS = {  # script -> numbers of arguments it takes
    TRAINER: (23, 24),
    "examples/qwen2_5_vl/run_mcore_qwen.sh": (23, 24),
    "examples/qwen3_vl/run_mcore_qwen.sh": (23, 24),
    CONVERTOR: (7, 8),
    "toolkits/model_checkpoints_convertor/qwen/hf2mcore_qwen2_vl_convertor.sh": (7, 8),
    "toolkits/model_checkpoints_convertor/qwen/hf2mcore_qwen2_5_vl_convertor.sh": (7, 8),
    "toolkits/model_checkpoints_convertor/qwen/hf2mcore_qwen3_vl_convertor.sh": (7, 8),
}
# What the commands shown there write, what a checkpoint holds, and whose models a hub has.
MADE = ("runs", "ckpt", ".quickstart", ".venv", ".venv-test", "iter_0000100", "release", "hf",
        "Qwen")
# A table of a folder names what is in it without repeating the folder.
FOLDERS = (ROOT, ROOT / "tests", ROOT / "megatron_vl", ROOT / "megatron_vl" / "models")
SITES = ("https://github.com/", "https://arxiv.org/", "http://www.apache.org/")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
LINK_OF_A_TWIN = re.compile(r"(?<=docs/)zh/|_zh(?=\.md)")  # what tells it from the English one's


@cache
def text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str | None = None) -> list[str]:
    """The code blocks of a document, of one language or of all."""
    return [body for name, body in FENCE.findall(text(document)) if language in (None, name)]


def prose(document: str) -> str:
    return FENCE.sub("", text(document))


def commands(document: str) -> list[list[str]]:
    """The command lines of its bash blocks as words, without environment assignments."""
    lines = [
        shlex.split(line, comments=True)
        for block in blocks(document, "bash")
        for line in block.replace("\\\n", " ").splitlines() if line.strip()
    ]
    for words in lines:
        while re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
            del words[0]
    return lines


def headings(document: str) -> list[tuple[int, str]]:
    found = re.findall(r"^(#+) +(.+?) *$", prose(document), re.M)
    return [(len(marks), title) for marks, title in found]


def tables(document: str) -> list[list[list[str]]]:
    """Every table as rows of cells; the line under its heading is left out."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", prose(document), re.M)
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()
         if not re.fullmatch(r"[|\s:-]+", row)]
        for table in found
    ]


@cache
def parser(command: str) -> Parser:
    root = Parser()
    commands = root.add_subparsers()
    import_module(f"megatron_vl.cli.{command.replace('-', '_')}").add_parser(commands)
    commands.choices[command].add_argument("--debug")
    return commands.choices[command]


def options(command: str) -> set[str]:
    return set(parser(command)._option_string_actions)


# ---- paths and links --------------------------------------------------------------------------


def paths(document: str) -> list[str]:
    """Words of code that name something in the repository."""
    top = {path.name for path in ROOT.iterdir()}
    words = [word for code in CODE.findall(prose(document)) for word in code.split()]
    words += [word for line in commands(document) for word in line]
    return [
        word for word in words if word.split("/")[0] not in MADE
        and (re.match(r"[\w.-]+/", word) or ("." in word and word in top))
    ]


def names(document: str) -> set[str]:
    """Scripts named without their folder."""
    return {code for code in CODE.findall(prose(document)) if re.fullmatch(r"\w+\.(py|sh)", code)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_is_named_exists(document):
    missing = [path for path in paths(document)
               if not any((folder / path).exists() for folder in FOLDERS)]
    assert not missing, f"{document} names {missing}"
    somewhere = {path.name for path in ROOT.rglob("*.py")} | {p.name for p in ROOT.rglob("*.sh")}
    assert names(document) <= somewhere


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_placeholder_was_forgotten(document):
    """A line of capitals alone, where a table or figures were to come."""
    assert not re.findall(r"^ *[A-Z][A-Z0-9_ ]+ *$", prose(document), re.M)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    for target in LINK.findall(prose(document)):
        if target.startswith("http"):
            assert target.startswith(SITES), target
            continue
        file, _, anchor = target.partition("#")
        assert not anchor, f"{document}: link to a heading, {target}; headings change"
        assert ((ROOT / document).parent / file).exists(), f"{document} links to {target}"


def test_every_folder_is_in_the_table_of_both_readmes():
    folders = {"toolkits/", "examples/", "tests/", "docs/"}
    folders |= {f"megatron_vl/{room}/" for room in ROOMS
                if (ROOT / "megatron_vl" / room).is_dir()}
    for readme in READMES:
        named = {CODE.findall(row[0])[0] for table in tables(readme) for row in table
                 if CODE.fullmatch(row[0]) and row[0].endswith("/`")}
        assert named == folders, readme


def test_the_table_of_schedulers_is_the_one_that_is_read():
    table = next(t for t in tables("docs/clusters.md") if t[0][1] == "row")[1:]
    rows = [(row[1], tuple(CODE.findall(row[2]))) for row in table]
    assert rows == [(row.source, row.signs) for row in SCHEDULERS]
    assert [row[0] for row in table] == [str(number + 1) for number in range(len(table))]


def test_the_table_of_packages_is_the_enforced_one():
    table = next(t for t in tables("docs/architecture.md") if t[0][0] == "package")
    rooms = {row[0].strip("`/"): tuple(CODE.findall(row[2])) for row in table[1:]}
    modules = (*ALWAYS, "__main__")
    assert rooms == {room: may for room, may in ROOMS.items() if room not in modules}


# ---- commands and options ---------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_can_be_given_as_it_is_written(document):
    for words in commands(document):
        program, given = words[0], words[1:]
        assert program in ("megatron-vl", "mm-convert", "bash", "python", "pip"), words
        if program == "megatron-vl":
            assert given[0] in COMMANDS, words
            if given[0] == "launch":  # behind -- another command of the program
                own = given.index("--")
                given, inner = given[:own], given[own + 1 :]
                assert {w for w in inner if w.startswith("--")} <= options(inner[0]), words
            unknown = {w for w in given if w.startswith("--")} - options(given[0])
            assert not unknown, f"megatron-vl {given[0]} has no {unknown}"
        elif program == "mm-convert":
            mm_convert().parse_args(given)
        elif program == "pip":
            assert given == ["install", "-e", ".[test]"], words
        else:
            assert (ROOT / given[0]).is_file(), words
            flags = [word.lstrip("-") for word in given if word.startswith("--")]
            assert all(flag in text(given[0]) for flag in flags), words
            assert len(given) - 1 in ARGUMENTS.get(given[0], (len(given) - 1,)), words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_option_in_a_sentence_exists(document):
    known = set().union(*(options(command) for command in COMMANDS))
    for code in CODE.findall(prose(document)):
        words = code.split()
        if words[0] == "megatron-vl" and len(words) > 1:
            assert words[1] in COMMANDS, code
        unknown = {word.split("=")[0] for word in words if word.startswith("--")} - known
        assert not unknown, f"{document}: {code}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_configuration_file_shown_is_valid(document, tmp_path):
    for block in blocks(document, "yaml"):
        (tmp_path / "run.yaml").write_text(block)
        config = load_config({}, str(tmp_path / "run.yaml"))
        shown = {key.replace("-", "_") for key in yaml.safe_load(block)}
        assert shown <= config.to_dict().keys()


# ---- the launchers' arguments -----------------------------------------------------------------


def usage(script: str) -> tuple[list[str], set[str]]:
    """(arguments in order, variables) of a script's own usage table."""
    table = text(script).split("<<TABLE\n")[1].split("\nTABLE\n")[0]
    arguments = re.findall(r"^ +(?:\d+|--) (\w+) ", table, re.M)
    variables = re.findall(r"^  ([A-Z][A-Z0-9_]+) {2,}", table, re.M)
    return arguments, set(variables)


@pytest.mark.parametrize("readme", READMES)
@pytest.mark.parametrize(("script", "number"), [(TRAINER, 0), (CONVERTOR, 1)])
def test_the_tables_of_arguments_are_those_of_the_scripts(readme, script, number):
    numbered = [table[1:] for table in tables(readme) if table[0][0] == "" and table[1][0] == "1"]
    rows = numbered[number]
    arguments, _ = usage(script)
    assert [CODE.findall(row[1])[0] for row in rows] == arguments
    count = iter(range(1, len(rows) + 1))
    assert [row[0] for row in rows] == [
        "–" if argument == "SP" else str(next(count)) for argument in arguments
    ]


@pytest.mark.parametrize("readme", READMES)
def test_the_variables_of_the_launchers_are_those_of_the_scripts(readme):
    named = set(re.findall(r"\bMP_[A-Z0-9_]+", text(readme)))
    assert named == {
        name for script in (TRAINER, CONVERTOR) for name in usage(script)[1]
        if name.startswith("MP_")
    }
    read = set(re.findall(r"\$\{?(MP_[A-Z0-9_]+)", text(TRAINER) + text(CONVERTOR)))
    assert named == read


# ---- two languages ----------------------------------------------------------------------------


def test_both_readmes_have_the_same_headings_blocks_tables_and_links():
    english, chinese = READMES
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    assert blocks(english) == blocks(chinese)
    shapes = [[(len(table), len(table[0])) for table in tables(readme)] for readme in READMES]
    assert shapes[0] == shapes[1]
    links = [{LINK_OF_A_TWIN.sub("", link) for link in LINK.findall(prose(readme))}
             for readme in READMES]
    assert links[0] == links[1]
    # Every path and option stands in both, whatever is written around it.
    codes = [{code for code in CODE.findall(prose(readme)) if "/" in code or code.startswith("-")}
             for readme in READMES]
    assert codes[0] == codes[1]


def twin(page: str) -> str:
    return page.replace("docs/", "docs/zh/")


def untranslated(cell: str) -> list[str]:
    """What every language writes alike: code, in an order of its own, or a cell of figures."""
    return [cell] if re.fullmatch(r"[\d.,:%e*/ +-]+", cell) else sorted(CODE.findall(cell))


def test_every_page_has_a_chinese_twin_and_there_is_nothing_else():
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "zh").rglob("*")}
    assert there == set(map(twin, PAGES))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_and_its_chinese_twin_have_the_same_headings_blocks_and_tables(page):
    assert [level for level, _ in headings(page)] == [level for level, _ in headings(twin(page))]
    assert FENCE.findall(text(page)) == FENCE.findall(text(twin(page)))
    cells = [[[list(map(untranslated, row)) for row in table] for table in tables(name)]
             for name in (page, twin(page))]
    assert cells[0] == cells[1]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_and_its_chinese_twin_link_to_each_other_at_the_top(page):
    name = page.removeprefix("docs/")
    assert text(page).splitlines()[2] == f"[中文](zh/{name})"
    assert text(twin(page)).splitlines()[2] == f"[English](../{name})"
    links = [{(ROOT / path).parent.joinpath(link).resolve() for link in LINK.findall(prose(path))
              if not link.startswith("http")} for path in (page, twin(page))]
    others = [{path.name for path in there if path.name != name} for there in links]
    assert others[0] == others[1]
    assert all(path.parent.name == "zh" for path in links[1]
               if path.suffix == ".md" and path.name != name), "its links are to Chinese pages"


@pytest.mark.parametrize("document", ["README_zh.md", *map(twin, PAGES)])
def test_a_chinese_document_is_chinese(document):
    words = CODE.sub("", LINK.sub("", prose(document)))
    for paragraph in words.split("\n\n"):  # one may be full of versions and figures
        if len(paragraph) > 80 and not paragraph.startswith("|"):
            assert len(re.findall("[\u4e00-\u9fff]", paragraph)) > len(paragraph) / 6, paragraph


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_document_names_a_host_beyond_the_known_sites(document):
    for url in re.findall(r"https?://[^\s)>`]+", text(document)):
        assert url.startswith(SITES), url
    assert not re.search(r"--(extra-)?index-url|/root/|/tmp/", text(document))
